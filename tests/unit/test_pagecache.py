"""When pages are put into the page cache."""

from __future__ import annotations

import pyfuse3
import pytest

from lazyfs.pagecache.page_cache import PageCache


@pytest.mark.parametrize("setting", ["auto", 1 << 30])
def test_nothing_is_pushed_before_libfuse_talks_to_the_kernel(
    setting: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it has a socket, in which a message would be lost, or be too long for it."""
    pushed: list[int] = []
    monkeypatch.setattr(pyfuse3, "notify_store", lambda inode, at, data: pushed.append(inode))
    page_cache = PageCache(setting)
    assert page_cache.budget(lambda: 1, 0) == 0
    assert not page_cache.push(2, 0, memoryview(b"pages"))
    page_cache.connected = True
    assert page_cache.budget(lambda: 1, 0) > 0
    assert page_cache.push(2, 0, memoryview(b"pages"))
    assert pushed == [2]
