"""Which parts of a file lie in the page cache, as the helper process sees it."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest
from descriptors import descriptors

from lazyfs.cache import block_format
from lazyfs.pagecache import mincore

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Four pages. The first and the third were written; the others are holes that nobody read."""
    path = tmp_path / "f"
    with path.open("wb") as made:
        made.truncate(4 * PAGE)
        for page in (0, 2):
            made.seek(page * PAGE)
            made.write(b"x" * PAGE)
    return path


@pytest.mark.parametrize(
    ("offset", "length", "there"),
    [
        (0, PAGE, True),
        (PAGE, PAGE, False),
        (0, 2 * PAGE, False),
        (0, PAGE + 1, False),
        (2 * PAGE, PAGE, True),
        (2 * PAGE + 10, 100, True),
        (3 * PAGE - 5, 5, True),
        (3 * PAGE - 5, 6, False),
        (2 * PAGE - 1, 2, False),
    ],
)
def test_a_part_is_there_if_all_its_pages_are(
    file: Path, offset: int, length: int, there: bool
) -> None:
    with file.open("rb") as opened:
        assert (mincore.broken_pieces(opened.fileno(), offset, length) == 0) is there


def test_what_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="No such device"):
            mincore.broken_pieces(directory, 0, PAGE)
    finally:
        os.close(directory)


def test_the_parts_that_are_not_there_are_named(file: Path) -> None:
    parts, inode = [(page * PAGE, PAGE) for page in range(4)], file.stat().st_ino
    before = descriptors()
    assert mincore.dropped(file.parent, file.name, inode, parts) == [1, 3]
    assert mincore.dropped(file.parent.parent, f"{file.parent.name}/f", inode, parts) == [1, 3]
    assert mincore.dropped(file.parent, file.name, inode, []) == []
    assert descriptors() == before


PIECE = 256 << 10


def test_of_so_many_pieces_pages_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "pieces"
    with path.open("w+b") as made:
        made.truncate(6 * PIECE)
        for piece in (0, 2, 3):
            made.seek(piece * PIECE)
            made.write(b"x" * (PIECE if piece != 2 else PIECE - PAGE))
        made.flush()
        # Of pieces 1, 4 and 5 nothing is there, and of piece 2 a page is missing.
        parts = {(0, 6): 4, (0, 1): 0, (0, 2): 1, (2, 1): 1, (2, 2): 1, (3, 1): 0, (1, 5): 4}
        for (first, count), broken in parts.items():
            found = mincore.broken_pieces(made.fileno(), first * PIECE, count * PIECE)
            assert found == broken, (first, count)
        assert mincore.broken_pieces(made.fileno(), PIECE, PIECE + PAGE) == 1
        assert mincore.broken_pieces(made.fileno(), 4 * PIECE, PIECE + PAGE) == 2
    whole = (0, 6 * PIECE)
    allowed = [whole, (*whole, 0), (*whole, 3), (*whole, 4), (*whole, 5)]
    assert mincore.dropped(tmp_path, path.name, path.stat().st_ino, allowed) == [0, 1, 2]


def test_the_pieces_are_those_that_the_disk_reads() -> None:
    assert mincore._PIECE_PAGES * PAGE == PIECE == block_format.PIECE


def test_nothing_is_said_of_a_file_that_is_another_or_cannot_be_opened(file: Path) -> None:
    here, parts, inode = file.parent, [(PAGE, PAGE)], file.stat().st_ino
    (here / "link").symlink_to(file)
    (here / "way").symlink_to(here)
    os.mkfifo(here / "pipe")
    before = descriptors()
    assert mincore.dropped(here, "f", inode + 1, parts) == []
    for path in ("link", "way/f", "pipe", "none", "none/f", "f/f"):
        assert mincore.dropped(here, path, inode, parts) == []
    assert descriptors() == before


def test_nothing_is_said_of_files_of_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says of them that all pages are there."""
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert mincore.dropped(file.parent, "f", file.stat().st_ino, [(PAGE, PAGE)]) == []


def test_the_helper_looks_only_below_the_mountpoint(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = file.parent / "mount"
    inside.mkdir()
    below = inside / "a..b"
    below.touch()
    os.truncate(below, PAGE)
    part = [(PAGE, PAGE)]
    mincore.main(
        inside,
        [
            ("a..b", below.stat().st_ino, [(0, PAGE)]),
            ("../f", file.stat().st_ino, part),
            (str(file), file.stat().st_ino, part),
        ],
    )
    assert json.loads(capsys.readouterr().out) == [[0], [], []]
