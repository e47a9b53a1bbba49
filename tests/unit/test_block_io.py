"""Files of blocks, written and read here or by a mover."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache import block_io
from lazyfs.cache.block_format import Content, DamagedBlockError
from lazyfs.cache.block_io import NewFile, read_block, write_blocks
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.pool import Movers

BLOCK = 8192
CONTENT = Content("http://s3", "b", "m/a", '"1"', 2 * BLOCK + 100, BLOCK)


class Elsewhere:
    """A mover in this process.

    Args:
        fails: raised by each call, after it was made if `late`.
    """

    def __init__(self, fails: Exception | None = None, *, late: bool = False) -> None:
        self.called: list[str] = []
        self._fails = fails
        self._late = late

    def call(self, function: Callable[..., Any], *arguments: Any, buffer: Any) -> Any:
        self.called.append(function.__name__)
        if self._fails and not self._late:
            raise self._fails
        buffers = buffer if isinstance(buffer, list) else [buffer]
        result = function(*arguments, *buffers)
        if self._fails:
            raise self._fails
        return result


def movers(*given: Any, **more: Any) -> Movers:
    return cast(Movers, Elsewhere(*given, **more))


def block(number: int) -> memoryview:
    data = take_buffer(CONTENT.length(number))
    data[:] = bytes([number + 1]) * len(data)
    return data


def files(directory: Path) -> list[NewFile]:
    return [NewFile(directory / str(n), CONTENT, n, block(n)) for n in range(3)]


@pytest.fixture(params=["here", "elsewhere", "lost before", "lost after"])
def ways(request: pytest.FixtureRequest) -> Movers | None:
    """Where files are written and read; a mover may be killed before and after that."""
    return {
        "here": None,
        "elsewhere": movers(),
        "lost before": movers(MoverLostError()),
        "lost after": movers(MoverLostError(), late=True),
    }[request.param]


def test_blocks_come_back_as_they_were(tmp_path: Path, ways: Movers | None) -> None:
    assert write_blocks(files(tmp_path), ways) == (3, None)
    for number in range(3):
        assert read_block(tmp_path / str(number), CONTENT, number, ways) == block(number)
        assert (tmp_path / str(number)).stat().st_size == CONTENT.file_length(number)


def test_writing_nothing_asks_no_mover() -> None:
    mover = Elsewhere()
    assert write_blocks([], cast(Movers, mover)) == (0, None)
    assert mover.called == []


@pytest.mark.parametrize("where", [None, Elsewhere()])
def test_writing_ends_at_the_first_file_that_is_there_already(
    tmp_path: Path, where: object
) -> None:
    (tmp_path / "1").write_bytes(b"other")
    count, error = write_blocks(files(tmp_path), cast("Movers | None", where))
    assert count == 1
    assert error is not None
    assert (error.errno, error.strerror) == (errno.EEXIST, "File exists")
    assert (tmp_path / "1").read_bytes() == b"other"
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("where", [None, Elsewhere()])
def test_an_error_without_a_number_keeps_its_text(
    tmp_path: Path, where: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is odd")

    monkeypatch.setattr(block_io, "write_file", fail)
    count, error = write_blocks(files(tmp_path), cast("Movers | None", where))
    assert count == 0
    assert "the disk is odd" in str(error)


def test_a_mover_that_cannot_write_is_no_reason_to_write_here(tmp_path: Path) -> None:
    for fault in (MoverFaultError("a fault"), OSError(errno.ENOSPC, "full")):
        count, error = write_blocks(files(tmp_path), movers(fault))
        assert count == 0
        assert isinstance(error, OSError)
        assert str(fault) in str(error)
    assert list(tmp_path.iterdir()) == []


def test_what_a_mover_cannot_read_is_read_here(tmp_path: Path) -> None:
    write_blocks(files(tmp_path), None)
    for fault in (MoverLostError(), MoverFaultError("a fault")):
        assert read_block(tmp_path / "1", CONTENT, 1, movers(fault)) == block(1)
    with pytest.raises(OSError, match="bad disk"):
        read_block(tmp_path / "1", CONTENT, 1, movers(OSError(errno.EIO, "bad disk")))


@pytest.mark.parametrize("where", [None, Elsewhere()])
def test_damage_is_told_and_a_missing_file_is_an_error(tmp_path: Path, where: object) -> None:
    place = cast("Movers | None", where)
    write_blocks(files(tmp_path), None)
    with pytest.raises(DamagedBlockError, match="holds block 0"):
        read_block(tmp_path / "0", CONTENT, 1, place)
    with open(tmp_path / "1", "r+b") as file:
        file.write(b"x")
    with pytest.raises(DamagedBlockError, match="checksum"):
        read_block(tmp_path / "1", CONTENT, 1, place)
    (tmp_path / "2").write_bytes((tmp_path / "2").read_bytes() + b"x")
    with pytest.raises(DamagedBlockError, match="length"):
        read_block(tmp_path / "2", CONTENT, 2, place)
    with pytest.raises(FileNotFoundError):
        read_block(tmp_path / "3", CONTENT, 1, place)
