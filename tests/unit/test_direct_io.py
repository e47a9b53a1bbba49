"""Files that are written and read past the page cache."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from descriptors import descriptors

from lazyfs import cache_place
from lazyfs.blocks.buffers import ALIGNMENT, align, take_buffer
from lazyfs.cache import direct_io

TAIL = b"tail"


def buffer(content: bytes) -> memoryview:
    taken = take_buffer(len(content))
    taken[:] = content
    return taken


def read(path: Path, size: int, tail: int = len(TAIL)) -> tuple[bytes, bytes] | None:
    data = take_buffer(align(size))
    found = direct_io.read_file(path, data, tail)
    return None if found is None else (bytes(data[:size]), bytes(found))


@pytest.fixture(params=["direct", "refused"])
def path(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path on a filesystem with direct I/O (if /tmp has it), and on one without."""
    if request.param == "refused":
        opens = os.open

        def refuse(path: Path, flags: int, mode: int = 0o777, **more: int) -> int:
            if not flags & os.O_DIRECT:
                return opens(path, flags, mode, **more)
            if flags & os.O_CREAT:
                os.close(opens(path, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "no direct I/O")

        monkeypatch.setattr(direct_io.os, "open", refuse)
    return tmp_path / "f"


@pytest.mark.parametrize("make", [buffer, memoryview], ids=["aligned", "other"])
@pytest.mark.parametrize(
    "size", [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT, 5 * ALIGNMENT + 77]
)
def test_a_file_comes_back_as_it_was(
    path: Path, size: int, make: Callable[[bytes], memoryview]
) -> None:
    content = os.urandom(size)
    direct_io.write_file(path, make(content), TAIL)
    assert path.read_bytes() == content.ljust(align(size), b"\0") + TAIL
    assert read(path, size) == (content, TAIL)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(5 * ALIGNMENT + 77)
    writev = os.writev

    def write_some(descriptor: int, parts: list[memoryview]) -> int:
        first = next(part for part in parts if part)
        return writev(descriptor, [first[:ALIGNMENT]])

    def write_across(descriptor: int, parts: list[memoryview]) -> int:
        body, end = parts
        return writev(descriptor, [body, end[:ALIGNMENT]])

    for write in (write_some, write_across):
        monkeypatch.setattr(direct_io.os, "writev", write)
        direct_io.write_file(path, buffer(content), bytes(2 * ALIGNMENT) + TAIL)
        found = read(path, len(content), 2 * ALIGNMENT + len(TAIL))
        assert found == (content, bytes(2 * ALIGNMENT) + TAIL)
        path.unlink()


def test_a_file_of_another_length_is_not_read(path: Path) -> None:
    direct_io.write_file(path, buffer(b"x" * ALIGNMENT), TAIL)
    for size in (1, ALIGNMENT - 1):
        os.truncate(path, size)
        assert read(path, ALIGNMENT) is None
    os.truncate(path, ALIGNMENT + len(TAIL) + 1)
    assert read(path, ALIGNMENT) is None


def test_a_file_that_ends_while_it_is_read_is_not_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct_io.write_file(path, buffer(b"x" * ALIGNMENT), TAIL)
    monkeypatch.setattr(direct_io.os, "preadv", lambda *_: ALIGNMENT + len(TAIL) - 1)
    assert read(path, ALIGNMENT) is None


def test_nothing_is_overwritten_and_no_link_is_followed(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    path.symlink_to(other)
    for call in (
        lambda: direct_io.write_file(path, buffer(b"x"), TAIL),
        lambda: read(path, 1),
        lambda: direct_io.open_own(path),
    ):
        with pytest.raises(OSError):
            call()
    with pytest.raises(FileExistsError):
        direct_io.write_file(other, buffer(b"x"), TAIL)
    assert other.read_bytes() == b"other"


@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o770, 0o660)])
def test_the_group_may_do_with_files_what_it_may_do_with_the_directory(
    tmp_path: Path, folder: int, file: int
) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    place.chmod(folder)
    before = os.umask(0o077)
    try:
        assert direct_io.mode_in(place) == file
        os.close(direct_io.open_own(place / "small"))
        assert stat.S_IMODE((place / "small").stat().st_mode) == file
        (place / "small").chmod(0o604)
        os.close(direct_io.open_own(place / "small"))
        assert stat.S_IMODE((place / "small").stat().st_mode) == file, "it is put right"
        direct_io.make_folder(place / "below")
        made = stat.S_IMODE((place / "below").stat().st_mode)
        assert made == cache_place.folder_mode(place)
        direct_io.make_folder(place / "below")
    finally:
        os.umask(before)


def test_a_small_file_is_kept(tmp_path: Path) -> None:
    descriptor = direct_io.open_own(tmp_path / "small")
    os.write(descriptor, b"kept")
    os.close(descriptor)
    again = direct_io.open_own(tmp_path / "small")
    assert os.read(again, 9) == b"kept"
    os.close(again)


def test_a_small_file_of_another_worker_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its owner may change its mode, and is about to."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not the owner")

    (tmp_path / "small").write_bytes(b"kept")
    (tmp_path / "small").chmod(0o640)
    monkeypatch.setattr(direct_io.os, "fchmod", refuse)
    descriptor = direct_io.open_own(tmp_path / "small")
    assert os.read(descriptor, 9) == b"kept"
    os.close(descriptor)


def test_a_folder_with_the_right_mode_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker of root may have made it, whose it is."""
    changed: list[int] = []
    monkeypatch.setattr(direct_io.os, "fchmod", lambda _, mode: changed.append(mode))
    direct_io.make_folder(tmp_path / "00")
    os.close(direct_io.open_own(tmp_path / "small"))
    assert changed == []


@pytest.mark.parametrize("what", ["link", "file"])
def test_what_another_process_puts_in_place_of_a_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o755)

    def replaced(path: Path, **_: int) -> None:
        if what == "link":
            path.symlink_to(other)
        else:
            path.touch()

    monkeypatch.setattr(direct_io.Path, "mkdir", replaced)
    with pytest.raises(NotADirectoryError):
        direct_io.make_folder(tmp_path / "00")
    assert stat.S_IMODE(other.stat().st_mode) == 0o755


def test_no_descriptor_stays_open_or_goes_to_other_programs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, flags_of = os.open, []

    def noted(path: Path, flags: int, mode: int = 0o777, **more: int) -> int:
        flags_of.append(flags)
        return opens(path, flags, mode, **more)

    monkeypatch.setattr(direct_io.os, "open", noted)
    before = descriptors()
    direct_io.write_file(path, buffer(b"x" * ALIGNMENT), TAIL)
    assert read(path, ALIGNMENT) is not None
    assert read(path, 5 * ALIGNMENT) is None
    (path.parent / "below").mkdir()
    direct_io.make_folder(path.parent / "below")
    os.close(direct_io.open_own(path.parent / "small"))
    assert descriptors() == before
    assert all(flags & os.O_CLOEXEC and flags & os.O_NOFOLLOW for flags in flags_of)
