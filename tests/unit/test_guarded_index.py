"""The index of a directory while others damage, delete or replace it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lazyfs import cache_place
from lazyfs.cache import guarded_index
from lazyfs.cache.block_files import BlockFiles
from lazyfs.cache.guarded_index import GuardedIndex, Side, locked
from lazyfs.cache.index import (
    FOLDERS,
    INDEX_NAME,
    BlockIndex,
    IndexCorruptError,
    IndexFailedError,
)
from lazyfs.errors import CacheError

Guard = Callable[[], GuardedIndex]


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    """Opens the same directory, as one process after another does."""
    return lambda: GuardedIndex(tmp_path / "cache", BlockFiles(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The index."""
    return tmp_path / "cache" / INDEX_NAME


def count(index: GuardedIndex) -> int | None:
    """Count something in the index; returns how often, or None if that does not work."""

    def add(rows: BlockIndex) -> int:
        rows.add_counts(1, 0)
        return rows.hits_and_misses()[0]

    return index.attempt(Side.WRITING, add, None)


def damaged(_: BlockIndex) -> str:
    raise IndexCorruptError("damaged")


def test_the_first_use_makes_a_directory_that_only_its_user_may_enter(
    guard: Guard, file: Path
) -> None:
    index = guard()
    assert index.claims is None
    assert not file.parent.exists()
    assert count(index) == 1
    assert index.claims is not None
    names = {path.name for path in file.parent.iterdir()}
    assert names >= {*FOLDERS, INDEX_NAME, "claims", "waiting", "loading", "opening"}
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in file.parent.iterdir()} == {0}


def test_an_index_is_anew_only_for_who_made_it(guard: Guard, file: Path) -> None:
    first, second = guard(), guard()
    first.open()
    second.open()
    assert (first.is_anew, second.is_anew) == (True, False)
    assert (count(first), count(second)) == (1, 2)
    file.unlink()
    assert (count(second), count(first)) == (1, 2), "both use the one that was made again"
    assert second.is_anew


def test_an_index_without_content_is_made_anew(guard: Guard, file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    for end in ("-wal", "-shm"):
        file.with_name(INDEX_NAME + end).write_bytes(b"of a former index" * 1000)
    index = guard()
    index.open()
    assert index.is_anew
    assert count(index) == 1


def test_an_index_stays_open_while_it_is_the_one_in_the_directory(guard: Guard) -> None:
    index = guard()
    used: list[BlockIndex] = []
    for _ in range(3):
        index.attempt(Side.READING, used.append, None)
    assert used[0] is used[1] is used[2]


class Meeting:
    """A lock for which a number of threads have to ask before one of them gets it."""

    def __init__(self, threads: int) -> None:
        self._lock, self._barrier = threading.Lock(), threading.Barrier(threads, timeout=60)

    def __enter__(self) -> None:
        self._barrier.wait()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_threads_that_come_at_once_open_one_index(guard: Guard) -> None:
    index = guard()
    index._opening = cast(threading.Lock, Meeting(3))
    used: list[BlockIndex] = []
    threads = [
        threading.Thread(target=index.attempt, args=(Side.READING, used.append, None))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(used) == 3
    assert used[0] is used[1] is used[2]


def test_a_damaged_index_is_deleted_and_made_anew_at_the_next_use(guard: Guard, file: Path) -> None:
    index = guard()
    assert count(index) == 1
    index.is_anew = False
    assert index.attempt(Side.READING, damaged, "nothing") == "nothing"
    assert not file.exists()
    assert not index.is_resting(Side.READING), "it can be used at once"
    assert count(index) == 1
    assert index.is_anew


def test_a_damaged_index_that_another_process_has_replaced_stays(guard: Guard, file: Path) -> None:
    first, second = guard(), guard()
    first.open()
    second.open()

    def replaced_meanwhile(_: BlockIndex) -> None:
        assert first.attempt(Side.READING, damaged, None) is None
        assert count(first) == 1
        raise IndexCorruptError("damaged")

    second.attempt(Side.READING, replaced_meanwhile, None)
    assert not second.is_anew
    assert count(second) == 2, "it counts in the new one"


def test_a_damaged_index_is_replaced_when_a_mount_begins(guard: Guard, file: Path) -> None:
    guard().open()
    for end in ("-wal", "-shm"):
        file.with_name(INDEX_NAME + end).unlink(missing_ok=True)
    file.write_bytes(b"no database" * 1000)
    index = guard()
    index.open()
    assert index.is_anew
    assert count(index) == 1


def test_a_mount_does_not_begin_if_a_new_index_is_damaged_as_well(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IndexCorruptError("damaged")

    monkeypatch.setattr(guarded_index, "BlockIndex", fail)
    with pytest.raises(IndexCorruptError):
        guard().open()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "bad"), IndexFailedError("locked"), CacheError("not writable")]
)
@pytest.mark.parametrize("side", Side)
def test_a_side_that_fails_is_left_alone_and_the_other_is_not(
    guard: Guard, error: Exception, side: Side
) -> None:
    index = guard()

    def fail(_: BlockIndex) -> str:
        raise error

    assert index.attempt(side, fail, "nothing") == "nothing"
    assert [index.is_resting(each) for each in Side] == [each is side for each in Side]
    assert index.attempt(side, lambda _: "found", "nothing") == "nothing"
    (other,) = (each for each in Side if each is not side)
    assert index.attempt(other, lambda _: "found", "nothing") == "found"


def test_a_disk_that_fails_as_a_damaged_index_is_replaced_is_left_alone(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    index = guard()
    index.open()
    monkeypatch.setattr(guarded_index, "remove_index", fail)
    assert index.attempt(Side.READING, damaged, "nothing") == "nothing"
    assert index.is_resting(Side.READING)


def test_a_fault_is_not_hidden(guard: Guard) -> None:
    index = guard()
    with pytest.raises(ZeroDivisionError):
        index.attempt(Side.READING, lambda _: 1 // 0, 7)
    assert not index.is_resting(Side.READING)


def test_a_directory_that_was_removed_is_made_again(guard: Guard, file: Path) -> None:
    index = guard()
    assert count(index) == 1
    shutil.rmtree(file.parent)
    assert count(index) == 1
    assert index.is_anew
    assert index.claims is not None and index.claims.claim("a:0")
    assert guard().attempt(Side.READING, lambda _: True, False)


def test_the_disk_is_read_and_the_directory_checked_before_anything_is_opened(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite maps a file: no thread may wait for the disk there."""
    done: list[tuple[str, Any]] = []
    check, index = cache_place.check, guarded_index.BlockIndex
    monkeypatch.setattr(cache_place, "read_disk", lambda path: done.append(("read", path)))
    monkeypatch.setattr(
        cache_place, "check", lambda path: (done.append(("check", path)), check(path))
    )
    monkeypatch.setattr(
        guarded_index, "BlockIndex", lambda path: (done.append(("open", path)), index(path))[1]
    )
    opened = guard()
    opened.open()
    path = opened._path
    assert done == [("read", path), ("check", path), ("open", path)]


def test_one_process_has_the_lock_of_a_file_and_others_need_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, wait=True) as ours:
        assert ours is not None
        assert os.fstat(ours).st_ino == path.stat().st_ino
        for _ in range(2):
            with locked(path, wait=False) as theirs:
                assert theirs is None
    with locked(path, wait=False) as again:
        assert again is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(again)


def test_who_waits_for_a_lock_gets_it_from_the_one_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(guarded_index.fcntl, "flock", lambda _, kind: asked.append(kind))
    with locked(tmp_path / "lock", wait=True):
        pass
    with locked(tmp_path / "lock", wait=False):
        pass
    assert asked == [fcntl.LOCK_EX, fcntl.LOCK_EX | fcntl.LOCK_NB]


def test_a_lock_that_cannot_be_had_at_all_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(guarded_index.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="no locks"), locked(tmp_path / "lock", wait=False):
        pass
