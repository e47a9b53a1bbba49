"""Who may use a cache directory after root has shared it with its workers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lazyfs import cache_place, user

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or user.worker_ids() is None, reason="only root shares its caches"
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_files_of_a_cache_are_shared(tmp_path: Path) -> None:
    """A worker that was taken over may have left links to files of root."""
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    folder = cache / "a0"
    folder.mkdir(parents=True)
    outside.write_text("root's")
    outside.chmod(0o600)
    block, link, other = folder / ("1" * 30), folder / ("2" * 30), folder / "notes"
    for path in (block, other):
        path.write_text("x")
        path.chmod(0o600)
    link.symlink_to(outside)
    (cache / "b0").symlink_to(tmp_path)
    cache_place.share(cache)
    assert cache_place.is_shared(cache.stat())
    group = user.cache_group()
    assert (block.stat().st_gid, mode(block)) == (group, 0o660)
    assert (folder.stat().st_gid, mode(folder)) == (group, 0o2770)
    for untouched in (outside, other):
        assert (untouched.stat().st_gid, mode(untouched)) == (0, 0o600)
    assert link.lstat().st_gid == 0


def test_a_directory_that_cannot_be_shared_stays_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops the set-group-ID bit silently, where a capability is missing."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    before = cache.stat()
    chmod = Path.chmod
    monkeypatch.setattr(Path, "chmod", lambda path, mode: chmod(path, mode & ~stat.S_ISGID))
    with pytest.raises(PermissionError, match="CAP_FSETID"):
        cache_place.share(cache)
    after = cache.stat()
    assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
