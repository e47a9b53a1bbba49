"""What is left over in a cache directory: what goes, and what only looks like it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyfs.blocks.buffers import take_buffer
from lazyfs.cache import sweep as module
from lazyfs.cache.block_files import BlockFiles
from lazyfs.cache.block_format import Content
from lazyfs.cache.claims import Claims
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.index import BlockIndex, Entry
from lazyfs.cache.space import Limits
from lazyfs.cache.sweep import SWEEP_S, is_due, sweep

NOW_S = 1_700_000_000.0
NAMES = [f"{folder}0/{folder * 30}" for folder in "abcdef"]


class Place:
    """A directory with rows and files, some of them without the other."""

    def __init__(self, path: Path) -> None:
        self.files = BlockFiles(path)
        self.files.make_folders()
        self.index = BlockIndex(path)
        self.claims = Claims(path)
        self.writing: set[str] = set()

    def add(self, key: str, name: str, *, row: bool = True, file: bool = True) -> None:
        """A block that is ready."""
        if row:
            self.add_pending(key, name, file=False)
            assert self.index.complete([(Entry(key, name, 10, "tag"), None)]) == [True]
        if file:
            self.files.path(name).write_bytes(b"block")

    def add_pending(self, key: str, name: str, *, file: bool) -> None:
        """A block that is being written."""
        self.index.reserve([Entry(key, name, 10, "tag")], NOW_S, 1 << 40, 0)
        if file:
            self.files.path(name).write_bytes(b"half")

    def sweep(self, adopt: Callable[[str], bool] | None = None) -> tuple[list[str], list[str]]:
        """The names of rows and of files that are there after that."""
        sweep(self.index, self.files, self.claims, self.writing, adopt)
        return sorted(row.filename for row in self.index.rows()), sorted(self.files.names())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.index.close()


def test_files_without_a_row_and_rows_without_a_file_go_and_nothing_else(place: Place) -> None:
    place.add("a:0", NAMES[0])
    place.add("a:1", NAMES[1], row=False)
    place.add("a:2", NAMES[2], file=False)
    place.add("a:3", NAMES[3], row=False)
    place.add("a:4", NAMES[4], file=False)
    place.add("a:5", NAMES[5])
    assert place.sweep() == ([NAMES[0], NAMES[5]], [NAMES[0], NAMES[5]])
    assert place.index.used_bytes() == 20


def test_what_a_dead_process_wrote_goes_and_what_is_being_written_stays(
    place: Place, tmp_path: Path
) -> None:
    place.add_pending("a:0", NAMES[0], file=True)
    place.add_pending("a:1", NAMES[1], file=False)
    place.add_pending("a:2", NAMES[2], file=True)
    place.add_pending("a:3", NAMES[3], file=False)
    place.add("a:4", NAMES[4])
    writer = Claims(tmp_path)
    assert all(writer.claim(key) for key in ("a:2", "a:3", "a:9"))
    assert place.sweep() == ([NAMES[2], NAMES[3], NAMES[4]], [NAMES[2], NAMES[4]])


def test_a_claim_to_a_block_whose_file_was_deleted_keeps_no_row(
    place: Place, tmp_path: Path
) -> None:
    place.add("a:0", NAMES[0], file=False)
    assert Claims(tmp_path).claim("a:0")
    assert place.sweep() == ([], [])


def test_a_block_that_was_stored_since_the_files_were_listed_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = place.files.names

    def names_and_then_store() -> list[str]:
        listed = names()
        place.add("a:0", NAMES[0])
        return listed

    monkeypatch.setattr(place.files, "names", names_and_then_store)
    sweep(place.index, place.files, place.claims, (), None)
    monkeypatch.undo()
    assert place.sweep() == ([NAMES[0]], [NAMES[0]])


def test_a_file_whose_row_was_lost_stays_if_it_is_taken_again(place: Place) -> None:
    place.add("a:0", NAMES[0])
    for name in NAMES[1:]:
        place.add("a", name, row=False)
    offered: list[str] = []

    def adopt(filename: str) -> bool:
        offered.append(filename)
        return filename in NAMES[2:4]

    _, files = place.sweep(adopt)
    assert sorted(offered) == NAMES[1:], "none that has a row"
    assert files == [NAMES[0], *NAMES[2:4]]


def test_blocks_that_become_complete_while_files_are_taken_again_stay(
    place: Place, tmp_path: Path
) -> None:
    place.add_pending("a:0", NAMES[0], file=True)
    place.add("a", NAMES[1], row=False)
    writer = Claims(tmp_path)
    assert writer.claim("a:0")

    def adopt(_: str) -> bool:
        assert place.index.complete([(Entry("a:0", NAMES[0], 10, "tag"), None)]) == [True]
        writer.release("a:0")
        return False

    assert place.sweep(adopt) == ([NAMES[0]], [NAMES[0]])


def test_a_block_that_becomes_complete_just_before_its_claim_is_looked_at_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.add_pending("a:0", NAMES[0], file=True)

    def complete(key: str) -> bool:
        assert place.index.complete([(Entry(key, NAMES[0], 10, "tag"), None)]) == [True]
        return False

    monkeypatch.setattr(place.claims, "is_taken", complete)
    assert place.sweep() == ([NAMES[0]], [NAMES[0]])


def test_what_this_process_writes_without_a_claim_stays(place: Place) -> None:
    place.add_pending("a:0", NAMES[0], file=True)
    place.add("a:1", NAMES[1], row=False)
    place.writing = {NAMES[0], NAMES[1]}
    assert place.sweep() == ([NAMES[0]], NAMES[:2]), "the index may have been made anew"
    place.writing = set()
    assert place.sweep() == ([], [])


@pytest.mark.parametrize("is_claimed", [True, False])
def test_what_this_process_is_writing_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_claimed: bool
) -> None:
    content = Content("http://s3", "b", "m/w", '"1"', 2 * 4096, 4096)
    cache = CacheDirectory(tmp_path / "cache", Limits(1 << 30))
    cache.open()
    cache.care([])
    os.utime(cache.path / "care", (0, 0))
    write_all = BlockFiles.write_all

    def write_as_it_is_swept(files: BlockFiles, blocks: object) -> object:
        cache.care([])
        assert time.time() - (cache.path / "care").stat().st_mtime < SWEEP_S
        return write_all(files, blocks)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockFiles, "write_all", write_as_it_is_swept)
    assert not is_claimed or (cache.claim(content, 0) and cache.claim(content, 1))
    blocks = [(content, number, take_buffer(4096)) for number in (0, 1)]
    assert cache.put_all(blocks) == [True, True]
    assert cache.present(content) == [0, 1]


@pytest.mark.parametrize(
    ("age_s", "due"),
    [(-0.5, True), (0.0, False), (SWEEP_S - 0.5, False), (SWEEP_S, True), (1e9, True)],
)
def test_a_directory_is_due_an_hour_after_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: float, due: bool
) -> None:
    monkeypatch.setattr(module.time, "time", lambda: NOW_S)
    with open(tmp_path / "care", "wb") as care:
        os.utime(care.fileno(), (NOW_S, NOW_S - age_s))
        assert is_due(care.fileno()) is due
