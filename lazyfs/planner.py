"""Looks at what was listed and tells the prefetcher what a loader will want.

Runs beside the mount from its first moment: nothing waits for it, and where it fails only
prefetching is lost. Which models are prefetched:

- the one model below the prefix, or the model or pipeline at its root, from the moment of mount;
- of several models, each from the moment in which one of its files is opened.
"""

from __future__ import annotations

import logging

import trio

from lazyfs.blocks import spans
from lazyfs.catalog import Catalog
from lazyfs.errors import SourceError
from lazyfs.fetcher import BlockFetcher
from lazyfs.model import PIPELINE_INDEX, ModelFile, ModelLayout, layouts
from lazyfs.observe.recorder import Recorder
from lazyfs.prefetch import Prefetcher
from lazyfs.safetensors import MalformedHeaderError, header_size, parse_header
from lazyfs.tree import File

log = logging.getLogger(__name__)

LENGTH_FIELD = 8
# Parsing takes 5 ms for a usual header (300 tensors), but seconds for the longest that the format
# allows; such a file is prefetched by offset.
LONGEST_HEADER = 16 << 20


class Planner:
    """Plans one mount.

    Args:
        catalog: what there is.
        fetcher: reads indexes and headers, and knows what is on disk.
        prefetcher: is told.
        recorder: is told when there is a plan.
    """

    def __init__(
        self, catalog: Catalog, fetcher: BlockFetcher, prefetcher: Prefetcher, recorder: Recorder
    ) -> None:
        self._recorder = recorder
        self._catalog = catalog
        self._fetcher = fetcher
        self._prefetcher = prefetcher
        self.planned = False
        self._opened: set[int] = set()
        self._send, self._news = trio.open_memory_channel[File](1000)

    def opened(self, file: File) -> None:
        """A file was opened. Never blocks; of very many at once some may be missed."""
        if file.inode not in self._opened:
            try:
                self._send.send_nowait(file)
            except trio.WouldBlock:
                return
            self._opened.add(file.inode)

    async def run(self) -> None:
        """Plan what is listed at mount, and go on as files are opened."""
        try:
            await self._catalog.children(self._catalog.tree.root)
        except SourceError as error:
            log.warning("nothing is prefetched from the start: %s", error)
        await self._plan()
        self.planned = True
        async with trio.open_nursery() as nursery:
            async for file in self._news:
                nursery.start_soon(self._look_into, file)

    async def _plan(self) -> None:
        """Put the files of the wanted models into loading order."""
        files = {self._catalog.tree.path(file): file for file in self._catalog.tree.files()}
        listed = [ModelFile(path, file.size_bytes) for path, file in files.items()]
        found = self._wanted(layouts(listed), files)
        indexes = {
            path: content
            for layout in found
            for path in layout.index_paths
            if (content := await self._content(files[path])) is not None
        }
        found = self._wanted(layouts(listed, indexes=indexes), files)
        for warning in (warning for layout in found for warning in layout.warnings):
            log.warning("%s", warning)
        small = [path for layout in found for path in layout.small]
        shards = [path for layout in found for path in layout.shards]
        order = [files[path] for path in (*small, *shards)]
        for file in order:
            await self._fetcher.scan(file)
        self._prefetcher.set_order([file.inode for file in order])
        self._recorder.planned(sum(file.size_bytes for file in order))
        self._fetcher.pump()

    def _wanted(
        self, found: tuple[ModelLayout, ...], files: dict[str, File]
    ) -> tuple[ModelLayout, ...]:
        """The models that are to be prefetched now."""
        models = [layout for layout in found if layout.shards]
        root = next((layout for layout in found if not layout.directory), None)
        if len(models) == 1 or (root and PIPELINE_INDEX in root.small):
            return found
        return tuple(
            layout
            for layout in found
            if (layout is root and layout.shards)
            or any(files[path].inode in self._opened for path in (*layout.small, *layout.shards))
        )

    async def _look_into(self, file: File) -> None:
        """A file was opened: its model is wanted, and its header says where its tensors are."""
        if not self._prefetcher.is_ordered(file.inode):
            await self._plan()
        if file.name.endswith(".safetensors"):
            try:
                await self._learn_tensors(file)
            except MalformedHeaderError as error:
                log.warning(
                    "%s: prefetched by offset, its header is not valid: %s", file.key, error
                )

    async def _learn_tensors(self, file: File) -> None:
        """Read a header. Who opened the file reads these bytes next, so nothing is fetched for it.

        Raises:
            MalformedHeaderError: it is not valid.
        """
        first = await self._content(file, LENGTH_FIELD)
        if first is None:
            return
        size = header_size(first, file.size_bytes)
        if size > LONGEST_HEADER:
            log.info("%s: prefetched by offset, its header has %d bytes", file.key, size)
            return
        header = await self._content(file, size)
        if header is not None:
            table = await trio.to_thread.run_sync(parse_header, header, file.size_bytes)
            self._prefetcher.set_tensors(file.inode, [tensor.begin for tensor in table.tensors])

    async def _content(self, file: File, length: int | None = None) -> bytes | None:
        """The first bytes of a file, or all; None if they cannot be had."""
        block_size = self._fetcher.block_size
        wanted = file.size_bytes if length is None else length
        parts = []
        for span in spans(0, wanted, file.size_bytes, block_size):
            try:
                parts.append(bytes(await self._fetcher.read(file, span, reader=False)))
            except SourceError:
                return None  # logged where it was fetched; its readers get the error
        return b"".join(parts)
