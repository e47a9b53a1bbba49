"""Sizes, cached bytes and ranges of a mount's files, served on its control socket.

With these `lazyfs inspect` needs no credentials for a mount: the worker has them. Requests here do
not count as reads, open no file, and keep no bytes.
"""

from __future__ import annotations

import base64
from typing import Any

import trio

from lazyfs.control import Route
from lazyfs.errors import ObjectGoneError
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.listed_object import File
from lazyfs.model.indexes import MAX_INDEX_BYTES
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.tree import Directory, Node
from lazyfs.store.protocol import Store


class Contents:
    """The files of one mount.

    Args:
        source: the object store.
        catalog: the listings so far.
        fetcher: knows the blocks on this machine.
    """

    def __init__(self, source: Store, catalog: Catalog, fetcher: BlockFetcher) -> None:
        self._source = source
        self._catalog = catalog
        self._fetcher = fetcher

    def routes(self) -> dict[tuple[str, str], Route]:
        """The requests that it answers on the control socket."""
        return {
            ("GET", "/files"): lambda _: self.list(),
            ("PUT", "/files/cached"): self.cached,
            ("PUT", "/files/read"): self.read,
        }

    async def list(self) -> dict[str, int]:
        """Sizes by path."""
        tree = self._catalog.tree
        await self._catalog.children(tree.root)
        return {tree.path(file): file.size_bytes for file in tree.files()}

    async def cached(self, body: dict[str, Any]) -> int:
        """How many bytes of the file at `path` are on the disk."""
        return await self._fetcher.cached_bytes(self._file(body))

    async def read(self, body: dict[str, Any]) -> dict[str, str]:
        """`length` bytes of the file at `path` from `offset`, in base64.

        Raises:
            SourceError: they cannot be read.
        """
        file, offset = self._file(body), int(body["offset"])
        length = min(int(body["length"]), MAX_INDEX_BYTES)
        data = self._fetcher.head(file)[offset : offset + length]
        if len(data) < length:
            data = await trio.to_thread.run_sync(
                self._source.ranges.read, file, offset, length,
                abandon_on_cancel=True,
            )  # fmt: skip
        return {"base64": base64.b64encode(data).decode()}

    def _file(self, body: dict[str, Any]) -> File:
        path = str(body["path"])
        node: Node | None = self._catalog.tree.root
        for name in path.split("/"):
            node = (node.children or {}).get(name) if isinstance(node, Directory) else None
        if not isinstance(node, File):
            raise ObjectGoneError(f"{path}: no such file in this mount")
        return node
