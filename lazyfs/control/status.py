"""What a worker says of itself at its control socket."""

from __future__ import annotations

import os
from typing import Any

from lazyfs import __version__
from lazyfs.fetcher import BlockFetcher
from lazyfs.filesystem import Filesystem
from lazyfs.pagecache import PageCache
from lazyfs.planner import Planner
from lazyfs.prefetch import Prefetcher


class Status:
    """The state of one mount, for `GET /status`.

    Args:
        source: as a URL.
        mountpoint: as a path.
        mounted_ns: when it was mounted, in nanoseconds since the epoch.
    """

    def __init__(
        self,
        source: str,
        mountpoint: str,
        mounted_ns: int,
        filesystem: Filesystem,
        fetcher: BlockFetcher,
        page_cache: PageCache,
        prefetcher: Prefetcher,
        planner: Planner,
    ) -> None:
        self._fixed = {
            "version": __version__,
            "pid": os.getpid(),
            "source": source,
            "mountpoint": mountpoint,
            "mounted_at_s": mounted_ns / 10**9,
        }
        self._filesystem = filesystem
        self._fetcher = fetcher
        self._page_cache = page_cache
        self._prefetcher = prefetcher
        self._planner = planner

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON can say it; names end in their unit."""
        fetcher, counters = self._fetcher, self._fetcher.counters
        wanted, there = self._prefetcher.progress()
        return self._fixed | {
            "trouble": fetcher.trouble,
            "prefetch": {
                "planned": self._planner.planned,
                "wanted_bytes": wanted,
                "there_bytes": there,
            },
            "reads": self._filesystem.reads,
            "fetched_bytes": counters.fetched_bytes,
            "fetched_blocks": counters.fetched_blocks,
            "from_disk_bytes": counters.loaded_bytes,
            "to_disk_bytes": counters.written_bytes,
            "shed_blocks": fetcher.shed_blocks,
            "pushed_bytes": self._page_cache.pushed_bytes,
            "memory_bytes": fetcher.memory_bytes,
            "in_flight": fetcher.in_flight,
        }
