"""What a mount says about a cache directory that it cannot use, and when it does without one."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path

import pytest

from lazyfs.cache import BlockCache, guarded_index
from lazyfs.cache.block_files import BlockFiles
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.guarded_index import REST_S, GuardedIndex, Side
from lazyfs.cache.index import BlockIndex, IndexFailedError, IndexFullError
from lazyfs.cache.space import Limits
from lazyfs.errors import CacheError


def cache_in(*paths: Path) -> BlockCache:
    return BlockCache(paths, Limits(1 << 20), "http://s3", "bucket", 4096)


def failing(monkeypatch: pytest.MonkeyPatch, path: Path, error: Exception) -> None:
    """The directory at a path cannot be opened."""
    opens = CacheDirectory.open

    def fail(directory: CacheDirectory) -> None:
        if directory.path == path:
            raise error
        opens(directory)

    monkeypatch.setattr(CacheDirectory, "open", fail)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "Quota"), IndexFullError("full")],
)
def test_a_mount_does_without_a_directory_whose_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:  # fmt: skip
    full, other = tmp_path / "full", tmp_path / "other"
    failing(monkeypatch, full, error)
    cache_in(full, other).open()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"--cache-dir: {full}: its disk is full")
    assert (other / "cache.db").exists(), "the others are used"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), IndexFailedError("broken")])
def test_a_directory_that_does_not_work_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing(monkeypatch, tmp_path / "bad", error)
    with pytest.raises(CacheError, match=r"--cache-dir: .*/bad: cannot be used: .*broken; name"):
        cache_in(tmp_path / "good", tmp_path / "bad").open()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"--cache-dir: .*/file/cache: cannot be made: Not a dir"):
        cache_in(tmp_path / "file" / "cache").open()


def test_a_disk_that_fails_is_told_once_and_its_return_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now_s = time.monotonic()
    monkeypatch.setattr(guarded_index.time, "monotonic", lambda: now_s)
    index = GuardedIndex(tmp_path / "cache", BlockFiles(tmp_path / "cache"))
    broken = True

    def use(_: BlockIndex) -> str:
        if broken:
            raise OSError(errno.EIO, "broken")
        return "used"

    def attempt(side: Side = Side.WRITING) -> str:
        return index.attempt(side, use, "not used")

    for _ in range(3):
        assert attempt() == "not used"
        assert index.is_resting(Side.WRITING)
        assert not index.is_resting(Side.READING), "it may still be read"
        now_s += REST_S
        assert not index.is_resting(Side.WRITING)
    broken = False
    assert attempt(Side.READING) == "used"
    for _ in range(2):
        assert attempt() == "used"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"{tmp_path}/cache cannot be written: [Errno 5] broken" in told[0]
    assert told[1] == f"cache directory {tmp_path}/cache can be written again"


def test_while_it_rests_a_directory_is_not_asked(tmp_path: Path) -> None:
    index = GuardedIndex(tmp_path / "cache", BlockFiles(tmp_path / "cache"))
    asked: list[int] = []

    def fail(_: BlockIndex) -> None:
        asked.append(1)
        raise IndexFailedError("locked")

    for _ in range(3):
        index.attempt(Side.READING, fail, None)
    assert asked == [1]
