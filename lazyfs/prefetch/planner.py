"""Reads the listing and tells the prefetcher what a loader will read.

It runs beside the mount from the start: nothing waits for it, and if it fails only prefetching is
lost. Which models are prefetched:

- the one model below the prefix, or the model or pipeline at its root, from the moment of mount;
- one of several models, or any model with `--prefetch-on open`, when one of its small files is
  opened, or its weights are read. A look at their header is not enough;
- weights that were not expected to be read (a component, `consolidated*`, a variant), if they are.

The tensors of a shard are read from its header (`lazyfs/fetch/shard_headers.py`), for the
first shards as soon as it arrives, for others when they are opened: so thousands of shards cost no
memory and no time for tensors that are not read soon.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import trio

from lazyfs.blocks import block_count
from lazyfs.errors import SourceError
from lazyfs.listed_object import File
from lazyfs.model.safetensors import SUFFIX, has_head
from lazyfs.model.selection import wanted_models
from lazyfs.namespace.catalog import Catalog
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.prefetch.found_models import FoundModels, ListedFiles
from lazyfs.prefetch.model_contents import BlockSource, ModelContents
from lazyfs.prefetch.prefetcher import Prefetcher

log = logging.getLogger(__name__)

T = TypeVar("T")

# The headers of the first shards, and of those after a shard that was opened, are parsed before
# the shards are opened: this many.
TABLES_AHEAD = 16
# The most blocks of a shard that is prefetched: 8 TiB in blocks of 8 MiB.
MOST_BLOCKS = 1 << 20


async def _aside(work: Callable[[], T]) -> T:
    """Do in a thread what takes long for thousands of files, so that readers do not wait."""
    return await trio.to_thread.run_sync(work)


class Planner:
    """Plans one mount.

    Args:
        catalog: the listed files.
        fetcher: reads indexes and headers, and knows the blocks on disk.
        prefetcher: gets the plan, and knows which files were read.
        recorder: is told when there is a plan.
        options: what to prefetch, and when.

    Attributes:
        planned: whether there is a plan.
        on_wanted: called with files that became part of the plan.
    """

    def __init__(
        self,
        catalog: Catalog,
        fetcher: BlockSource,
        prefetcher: Prefetcher,
        recorder: Recorder,
        options: MountOptions,
    ) -> None:
        self._recorder = recorder
        self._catalog = catalog
        self._fetcher = fetcher
        self._prefetcher = prefetcher
        self._options = options
        self.planned = False
        self.on_wanted: Callable[[Sequence[File]], None] = lambda files: None
        # Inodes of files that were opened, and of files that were read unexpectedly.
        self._opened: set[int] = set()
        self._strays: set[int] = set()
        # Of the files at the last plan: those that belong to no model, and all weights.
        self._useless: set[int] = set()
        self._weights: set[int] = set()
        # Weights that may replace others as soon as they are opened, of all plans so far: once such
        # a file has replaced others, the next plan no longer names it.
        self._rivals: set[int] = set()
        # Warnings that were logged.
        self._told: set[str] = set()
        # What was found at the last plan, without the contents of indexes.
        self._listed: ListedFiles | None = None
        self._found: FoundModels | None = None
        # The shards in loading order, and the position of each.
        self._shards: list[File] = []
        self._ranks: dict[int, int] = {}
        # Shards whose headers are parsed as soon as they arrive.
        self._foremost: set[int] = set()
        self._contents = ModelContents(fetcher, prefetcher, options)
        self._send, self._news = trio.open_memory_channel[File](math.inf)
        prefetcher.on_stray = self._was_read
        prefetcher.on_head = self._has_come

    def opened(self, file: File) -> None:
        """Record that a file was opened. Never blocks."""
        if file.inode not in self._opened:
            self._opened.add(file.inode)
            self._send.send_nowait(file)

    def _was_read(self, inode: int) -> None:
        file = self._catalog.tree.get(inode)
        if isinstance(file, File) and inode not in self._strays:
            self._strays.add(inode)
            self._send.send_nowait(file)

    def _has_come(self, inode: int) -> None:
        file = self._catalog.tree.get(inode)
        if isinstance(file, File) and (inode in self._foremost or inode in self._opened):
            self._send.send_nowait(file)

    async def run(self) -> None:
        """Plan the files listed at mount, and plan again as files are opened."""
        try:
            await self._catalog.children(self._catalog.tree.root)
        except SourceError as error:
            log.warning("prefetching does not begin with the mount: %s", error)
        await self._plan()
        self.planned = True
        async with trio.open_nursery() as nursery:
            async for file in self._news:
                if self._is_unexpected(file):
                    await self._plan()
                for each in (file, *self._next_foremost(file)):
                    if self._contents.may_have_tensors(each):
                        nursery.start_soon(self._contents.learn_tensors, each)

    def _next_foremost(self, file: File) -> list[File]:
        """The shards after one that was opened whose headers are parsed from now on."""
        rank = self._ranks.get(file.inode)
        if rank is None or file.inode not in self._opened:
            return []
        after = self._shards[rank + 1 : rank + 1 + TABLES_AHEAD]
        found = [shard for shard in after if shard.inode not in self._foremost]
        self._foremost.update(shard.inode for shard in found)
        return [shard for shard in found if self._prefetcher.blocks.has_beginning(shard.inode)]

    def _is_unexpected(self, file: File) -> bool:
        """Whether opening or reading a file may change the plan."""
        if self._prefetcher.is_ordered(file.inode) or file.inode in self._useless:
            return False
        needs_load = file.inode in self._weights - self._rivals
        return file.inode in (self._strays if needs_load else self._opened)

    async def _plan(self) -> None:
        """Put the files of the wanted models into loading order."""
        listed = await self._list_files()
        files = listed.files
        on_mount = self._options.prefetch_on == "mount"
        whole = self._catalog.tree.is_whole
        read = self._read_of(listed)
        sorted_out = await self._sort_out(listed, read, {})
        self._rivals |= sorted_out.rivals
        opened = self._touched_paths(sorted_out)
        found = wanted_models(sorted_out.every, on_mount=on_mount, opened=opened, whole=whole)
        self.on_wanted([files[path] for layout in found for path in layout.paths])
        indexes = await self._contents.indexes(
            {path: files[path] for layout in found for path in layout.index_paths}
        )
        # Meanwhile a loader may have read other weights than expected.
        if indexes or read != self._read_of(listed):
            sorted_out = await self._sort_out(listed, self._read_of(listed), indexes)
            opened = self._touched_paths(sorted_out)
            found = wanted_models(sorted_out.every, on_mount=on_mount, opened=opened, whole=whole)
        self._weights, self._useless = sorted_out.weights, sorted_out.useless
        for warning in (line for each in found for line in (*each.problems, *each.warnings)):
            if warning not in self._told:
                self._told.add(warning)
                log.warning("%s", warning)
        small = [files[path] for layout in found for path in layout.small]
        shards = [files[path] for layout in found for path in layout.shards]
        shards = [file for file in shards if self._may_be_planned(file)]
        await self._fetcher.scan([*small, *shards])
        self._prefetcher.set_order(
            [file.inode for file in small],
            [file.inode for file in shards],
            [file.inode for file in shards if has_head(file)],
        )
        self._recorder.planned(sum(file.size_bytes for file in (*small, *shards)))
        planned = {file.inode for file in shards}
        self._fetcher.abandon(file for file in self._shards if file.inode not in planned)
        self._look_for_tensors(shards)
        self._fetcher.pump()

    async def _list_files(self) -> ListedFiles:
        """All listed files; made anew only if more was listed since the last plan."""
        tree = self._catalog.tree
        extent = tree.file_count, tree.total_bytes
        if self._listed is None or self._listed.extent != extent:
            nodes = list(tree.files())
            self._listed = await _aside(lambda: ListedFiles.of(extent, nodes, tree.path))
            self._found = None
        return self._listed

    async def _sort_out(
        self,
        listed: ListedFiles,
        read: tuple[Sequence[str], Sequence[str]],
        indexes: Mapping[str, bytes],
    ) -> FoundModels:
        """The models in the listing; those of the last plan if no file was read since."""
        if not indexes and self._found is not None and self._found.read == read:
            return self._found
        include = self._options.include
        found = await _aside(lambda: FoundModels.of(listed, read, indexes, include))
        if not indexes:
            self._found = found
        return found

    def _touched_paths(self, found: FoundModels) -> set[str]:
        """Small files that were opened, weights that were read, and rivals that were opened."""
        small = (
            self._opened - found.weights if self._options.prefetch_on == "mount" else self._opened
        )
        nodes = map(self._catalog.tree.get, small)
        return {self._catalog.tree.path(node) for node in nodes if isinstance(node, File)}.union(
            *found.read
        )

    def _read_of(self, listed: ListedFiles) -> tuple[Sequence[str], Sequence[str]]:
        """The weights that were read, or may have been, the latest last; and those opened.

        The latter only if there is a rival among them.
        """
        opened = self._opened if self._opened & self._rivals else ()
        read, seen = (
            [
                path
                for node in map(self._catalog.tree.get, inodes)
                if isinstance(node, File) and (path := self._catalog.tree.path(node))
                if path in listed.weights
            ]
            for inodes in (self._prefetcher.loaded(), sorted(opened))
        )
        return read, seen

    def _look_for_tensors(self, shards: Sequence[File]) -> None:
        """Have the headers of the first shards parsed; with `--tensors`, those of all shards."""
        some = self._options.tensors is not None
        self._shards = list(shards)
        self._ranks = {file.inode: rank for rank, file in enumerate(shards)}
        self._foremost = {file.inode for file in (shards if some else shards[:TABLES_AHEAD])}
        for file in shards if some else ():
            if not file.name.endswith(SUFFIX):
                self._prefetcher.set_tensors(file.inode, ())
            elif self._prefetcher.blocks.has_beginning(file.inode):
                self._send.send_nowait(file)  # it has arrived already

    def _may_be_planned(self, file: File) -> bool:
        """Whether a shard has a size that a loader can read."""
        is_usual = block_count(file.size_bytes, self._fetcher.block_size) <= MOST_BLOCKS
        if not is_usual:
            log.warning("%s: not prefetched, because it has %d bytes", file.key, file.size_bytes)
        return is_usual
