"""Looks at what was listed and tells the prefetcher what a loader will want.

Runs beside the mount from its first moment: nothing waits for it, and where it fails only
prefetching is lost.
"""

from __future__ import annotations

import logging

from lazyfs.catalog import Catalog
from lazyfs.fetcher import BlockFetcher
from lazyfs.prefetch import Prefetcher

log = logging.getLogger(__name__)


class Planner:
    """Plans one mount."""

    def __init__(self, catalog: Catalog, fetcher: BlockFetcher, prefetcher: Prefetcher) -> None:
        self._catalog = catalog
        self._fetcher = fetcher
        self._prefetcher = prefetcher

    async def run(self) -> None:
        """Plan the root directory and what was listed with it."""
        await self._catalog.children(self._catalog.tree.root)
        files = list(self._catalog.tree.files())
        small = [f for f in files if f.size_bytes < 1 << 20]
        shards = sorted((f for f in files if f.name.endswith(".safetensors")), key=lambda f: f.name)
        for f in small + shards:
            await self._fetcher.scan(f)
        self._prefetcher.set_order([f.inode for f in small + shards])
        self._fetcher.pump()
