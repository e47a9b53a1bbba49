"""Files of blocks, written and read here or by a mover."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache import block_io
from lazyfs.cache.block_format import PIECE, Content, DamagedBlockError, running_sums
from lazyfs.cache.block_io import NewFile, read_block, read_pieces, write_blocks
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
    sums, error = write_blocks(files(tmp_path), ways)
    assert (sums, error) == ([running_sums(block(number)) for number in range(3)], None)
    for number in range(3):
        assert read_block(tmp_path / str(number), CONTENT, number, ways) == block(number)
        assert (tmp_path / str(number)).stat().st_size == CONTENT.file_length(number)


def test_writing_nothing_asks_no_mover() -> None:
    mover = Elsewhere()
    assert write_blocks([], cast(Movers, mover)) == ([], None)
    assert mover.called == []


@pytest.mark.parametrize("where", [None, Elsewhere()])
def test_writing_ends_at_the_first_file_that_is_there_already(
    tmp_path: Path, where: object
) -> None:
    (tmp_path / "1").write_bytes(b"other")
    sums, error = write_blocks(files(tmp_path), cast("Movers | None", where))
    assert sums == [running_sums(block(0))]
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
    sums, error = write_blocks(files(tmp_path), cast("Movers | None", where))
    assert sums == []
    assert "the disk is odd" in str(error)


def test_a_mover_that_cannot_write_is_no_reason_to_write_here(tmp_path: Path) -> None:
    for fault in (MoverFaultError("a fault"), OSError(errno.ENOSPC, "full")):
        sums, error = write_blocks(files(tmp_path), movers(fault))
        assert sums == []
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


LONG = 5 * PIECE // 2
PARTS = [
    (0, 1),
    (PIECE - 1, PIECE),
    (PIECE - 1, PIECE + 1),
    (PIECE, 2 * PIECE),
    (2 * PIECE + 7, LONG),
    (LONG - 1, LONG),
    (0, LONG),
]


@pytest.fixture
def long(tmp_path: Path) -> NewFile:
    """The file of a block of two pieces and a half, with its path."""
    content = Content("http://s3", "b", "m/a", '"1"', LONG - 3, LONG - 3)
    data = take_buffer(LONG - 3)
    data[:] = (b"".join(number.to_bytes(4, "little") for number in range(LONG // 4 + 1)))[:-7]
    file = NewFile(tmp_path / "long", content, 0, data)
    assert write_blocks([file], None)[1] is None
    return file


@pytest.mark.parametrize(("start", "stop"), PARTS)
def test_a_part_is_read_without_the_rest(long: NewFile, start: int, stop: int) -> None:
    """Whatever is wrong with other pieces is not seen."""
    stop = min(stop, len(long.data))
    start = min(start, stop - 1)
    sums = running_sums(long.data)
    whole = long.path.read_bytes()
    first, last = start // PIECE * PIECE, -(-stop // PIECE) * PIECE
    with open(long.path, "r+b") as file:
        file.write(bytes(first))
        file.seek(last)
        file.write(bytes(max(0, len(whole) - last)))
    assert read_pieces(long.path, len(long.data), sums, start, stop) == long.data[start:stop]


@pytest.mark.parametrize(("start", "stop"), PARTS)
def test_damage_in_a_part_is_told(long: NewFile, start: int, stop: int) -> None:
    stop = min(stop, len(long.data))
    start = min(start, stop - 1)
    sums = running_sums(long.data)
    for at in {start // PIECE * PIECE, stop - 1}:  # in its pieces, if not in itself
        whole = bytearray(long.path.read_bytes())
        whole[at] ^= 1
        long.path.write_bytes(whole)
        with pytest.raises(DamagedBlockError, match="has a wrong checksum"):
            read_pieces(long.path, len(long.data), sums, start, stop)
        whole[at] ^= 1
        long.path.write_bytes(whole)
    os.truncate(long.path, start // PIECE * PIECE + 1)
    with pytest.raises(DamagedBlockError, match="has a wrong length"):
        read_pieces(long.path, len(long.data), sums, start, stop)
    long.path.unlink()
    with pytest.raises(FileNotFoundError):
        read_pieces(long.path, len(long.data), sums, start, stop)


def test_a_part_of_another_block_is_damage(long: NewFile, tmp_path: Path) -> None:
    """What the index says of a file is not believed."""
    other = long._replace(path=tmp_path / "other", data=take_buffer(len(long.data)))
    other.data[:] = bytes(len(other.data))
    (sums,), _ = write_blocks([other], None)
    with pytest.raises(DamagedBlockError, match="has a wrong checksum"):
        read_pieces(long.path, len(long.data), sums, PIECE, PIECE + 10)
