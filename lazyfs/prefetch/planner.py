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
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from posixpath import basename
from typing import Protocol, TypeVar

import trio

from lazyfs.blocks import Span, block_count, spans
from lazyfs.errors import SourceError
from lazyfs.model.directory import ModelFile
from lazyfs.model.filenames import format_of, may_be_weights
from lazyfs.model.json_cost import json_cost
from lazyfs.model.layout import ModelLayout, layouts
from lazyfs.model.safetensors import SUFFIX, MalformedHeaderError, Tensor, has_head, parse_header
from lazyfs.model.selection import wanted_models
from lazyfs.namespace.catalog import Catalog
from lazyfs.objects import File
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.prefetch.prefetcher import Prefetcher

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of so many shards, the first ones and those after one that was opened, it is found out what
# tensors they have before they are opened.
TABLES_AHEAD = 16
# Headers that are parsed concurrently: parsing holds the interpreter's lock.
LEARNERS = 2
# Of the memory limit, what parsing one index or header may take; and how many tensors may be known
# in a MiB of it: each takes 150 bytes.
PARSE_SHARE = 1 / 2
TENSORS_PER_MIB = 2048
# A shard with more blocks is none: 8 TiB in blocks of 8 MiB.
MOST_BLOCKS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Survey:
    """What is listed.

    Attributes:
        extent: number and bytes of files.
        files: by their paths.
        listed: the same, as `layouts` wants them.
        weights: paths of those that may be weights.
    """

    extent: tuple[int, int]
    files: Mapping[str, File]
    listed: Sequence[ModelFile]
    weights: Set[str]

    @classmethod
    def of(
        cls, extent: tuple[int, int], nodes: Iterable[File], path_of: Callable[[File], str]
    ) -> _Survey:
        files = {path_of(file): file for file in nodes}
        listed = [ModelFile(path, file.size_bytes) for path, file in files.items()]
        weights = {
            file.path
            for file in listed
            if format_of(name := basename(file.path)) or may_be_weights(name, file.size_bytes)
        }
        return cls(extent, files, listed, weights)


@dataclass(frozen=True, slots=True, eq=False)
class _SortedOut:
    """The models of a survey.

    Attributes:
        read: weights that were read, and those that were opened.
        every: what `layouts` makes of them.
        weights: inodes of all weights.
        rivals: inodes of weights that may replace others as soon as they are opened.
        useless: inodes of files of no model.
    """

    read: tuple[Sequence[str], Sequence[str]]
    every: tuple[ModelLayout, ...]
    weights: set[int]
    rivals: set[int]
    useless: set[int]

    @classmethod
    def of(
        cls,
        survey: _Survey,
        read: tuple[Sequence[str], Sequence[str]],
        indexes: Mapping[str, bytes],
        include: Sequence[str],
    ) -> _SortedOut:
        every = layouts(
            survey.listed, indexes=indexes, read=read[0], opened=read[1], include=include
        )
        rivals = {out.path for layout in every for out in layout.excluded}
        rivals.difference_update(*(layout.alternatives for layout in every))
        weights = {out.path for layout in every for out in layout.excluded}
        weights.update(*(layout.shards for layout in every))
        useless = survey.files.keys() - weights
        useless.difference_update(*(layout.small for layout in every))
        inodes = [
            {survey.files[path].inode for path in paths} for paths in (weights, rivals, useless)
        ]
        return cls(read, every, *inodes)


async def _aside(work: Callable[[], T]) -> T:
    """Do in a thread what takes a while for thousands of files: readers want to be answered."""
    return await trio.to_thread.run_sync(work)


class BlockSource(Protocol):
    """The part of `BlockFetcher` that the planner uses (`lazyfs/fetch/fetcher.py`)."""

    @property
    def block_size(self) -> int:
        """In bytes."""

    def add_file(self, file: File) -> None:
        """A file may be prefetched."""

    async def scan(self, files: Sequence[File]) -> None:
        """Find out which blocks of these files are on the disk."""

    def pump(self) -> None:
        """Start what may be started now."""

    def has_header(self, file: File) -> bool:
        """Whether the header of a shard is on this machine."""

    def is_coming(self, file: File) -> bool:
        """Whether the header of a shard is on its way."""

    async def header(self, file: File) -> memoryview | None:
        """The header of a shard; None: it is too long. Raises SourceError."""

    async def read(self, file: File, span: Span, *, reader: bool = True) -> memoryview:
        """A part of a block. Raises SourceError."""


class Planner:
    """Plans one mount.

    Args:
        catalog: the listed files.
        fetcher: reads indexes and headers, and knows the blocks on disk.
        prefetcher: gets the plan, and knows which files were read.
        recorder: is told when there is a plan.
        options: what to prefetch, and when.

    Attributes:
        planned: there is a plan.
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
        # Inodes of files that were opened, and of those that were read though not expected to be.
        self._opened: set[int] = set()
        self._strays: set[int] = set()
        # Of the files that were there at the last plan: those of no model, and all weights.
        self._useless: set[int] = set()
        self._weights: set[int] = set()
        # Weights that may replace others as soon as they are opened, at any plan so far: one that
        # was opened and replaced others is none any more.
        self._rivals: set[int] = set()
        # What was logged of models.
        self._told: set[str] = set()
        # What was found at the last plan, without the contents of indexes.
        self._survey: _Survey | None = None
        self._found: _SortedOut | None = None
        # In loading order, and the position of each.
        self._shards: list[File] = []
        self._ranks: dict[int, int] = {}
        # Of which shards it is found out what tensors they have as soon as their heads come.
        self._foremost: set[int] = set()
        self._learners = trio.CapacityLimiter(LEARNERS)
        # One header at a time, so that all of them do not take more than one may.
        self._parsing = trio.CapacityLimiter(1)
        self._parse_bytes = int(options.memory_limit * PARSE_SHARE)
        self._most_tensors = (options.memory_limit >> 20) * TENSORS_PER_MIB
        self._known_tensors = 0
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
            log.warning("nothing is prefetched from the start: %s", error)
        await self._plan()
        self.planned = True
        async with trio.open_nursery() as nursery:
            async for file in self._news:
                if self._is_unexpected(file):
                    await self._plan()
                for each in (file, *self._next_foremost(file)):
                    if self._may_have_tensors(each):
                        nursery.start_soon(self._learn_tensors, each)

    def _next_foremost(self, file: File) -> list[File]:
        """The shards after this one, if a reader has come to it, that were too far off before."""
        rank = self._ranks.get(file.inode)
        if rank is None or file.inode not in self._opened:
            return []
        after = self._shards[rank + 1 : rank + 1 + TABLES_AHEAD]
        found = [shard for shard in after if shard.inode not in self._foremost]
        self._foremost.update(shard.inode for shard in found)
        return [shard for shard in found if self._prefetcher.blocks.has_beginning(shard.inode)]

    def _is_unexpected(self, file: File) -> bool:
        """Whether what was done with a file may change the plan."""
        if self._prefetcher.is_ordered(file.inode) or file.inode in self._useless:
            return False
        needs_load = file.inode in self._weights - self._rivals
        return file.inode in (self._strays if needs_load else self._opened)

    def _may_have_tensors(self, file: File) -> bool:
        """Whether it is worth knowing what tensors are in it, and not known."""
        self._fetcher.add_file(file)
        if not file.name.endswith(SUFFIX) or not self._wants_tensors:
            return False
        # A worker that follows another may find all of it in the page cache, and so out of reach.
        if self._prefetcher.blocks.is_near(file.inode) and not self._fetcher.has_header(file):
            return False
        # What is on its way tells when it comes.
        return not self._prefetcher.knows_tensors(file.inode) and not self._fetcher.is_coming(file)

    @property
    def _wants_tensors(self) -> bool:
        """Whether the policy goes by tensors."""
        return self._options.prefetch != "headers" or self._options.tensors is not None

    async def _plan(self) -> None:
        """Put the files of the wanted models into loading order."""
        survey = await self._look_around()
        files = survey.files
        on_mount = self._options.prefetch_on == "mount"
        whole = self._catalog.tree.is_whole
        read = self._read_of(survey)
        sorted_out = await self._sort_out(survey, read, {})
        self._rivals |= sorted_out.rivals
        opened = self._touched_paths(sorted_out)
        found = wanted_models(sorted_out.every, on_mount=on_mount, opened=opened, whole=whole)
        self.on_wanted([files[path] for layout in found for path in layout.paths])
        indexes = await self._affordable_indexes(
            [files[path] for layout in found for path in layout.index_paths]
        )
        # Meanwhile others may have been read than were expected.
        if indexes or read != self._read_of(survey):
            sorted_out = await self._sort_out(survey, self._read_of(survey), indexes)
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
        self._look_for_tensors(shards)
        self._fetcher.pump()

    async def _look_around(self) -> _Survey:
        """All that is listed; looked at again only if there is more than at the last plan."""
        tree = self._catalog.tree
        extent = tree.file_count, tree.total_bytes
        if self._survey is None or self._survey.extent != extent:
            nodes = list(tree.files())
            self._survey = await _aside(lambda: _Survey.of(extent, nodes, tree.path))
            self._found = None
        return self._survey

    async def _sort_out(
        self,
        survey: _Survey,
        read: tuple[Sequence[str], Sequence[str]],
        indexes: Mapping[str, bytes],
    ) -> _SortedOut:
        """The models in the listing; those of the last plan, if no file was read since."""
        if not indexes and self._found is not None and self._found.read == read:
            return self._found
        include = self._options.include
        found = await _aside(lambda: _SortedOut.of(survey, read, indexes, include))
        if not indexes:
            self._found = found
        return found

    def _touched_paths(self, found: _SortedOut) -> set[str]:
        """Small files that were opened, weights that were read, and rivals that were opened."""
        small = (
            self._opened - found.weights if self._options.prefetch_on == "mount" else self._opened
        )
        nodes = map(self._catalog.tree.get, small)
        return {self._catalog.tree.path(node) for node in nodes if isinstance(node, File)}.union(
            *found.read
        )

    def _read_of(self, survey: _Survey) -> tuple[Sequence[str], Sequence[str]]:
        """The weights that were read, or may have been, the latest last; and those opened.

        The latter only if there is a rival among them.
        """
        opened = self._opened if self._opened & self._rivals else ()
        read, seen = (
            [
                path
                for node in map(self._catalog.tree.get, inodes)
                if isinstance(node, File) and (path := self._catalog.tree.path(node))
                if path in survey.weights
            ]
            for inodes in (self._prefetcher.loaded(), sorted(opened))
        )
        return read, seen

    def _look_for_tensors(self, shards: Sequence[File]) -> None:
        """See to it that it gets known what tensors there are: of some shards, or, where only some
        of them are wanted, of all."""
        some = self._options.tensors is not None
        self._shards = list(shards)
        self._ranks = {file.inode: rank for rank, file in enumerate(shards)}
        self._foremost = {file.inode for file in (shards if some else shards[:TABLES_AHEAD])}
        for file in shards if some else ():
            if not file.name.endswith(SUFFIX):
                self._prefetcher.set_tensors(file.inode, ())
            elif self._prefetcher.blocks.has_beginning(file.inode):
                self._send.send_nowait(file)  # it will not come once more

    async def _learn_tensors(self, file: File) -> None:
        """Read a header, and tell the prefetcher what it says."""
        async with self._learners:
            if not self._may_have_tensors(file):
                return
            try:
                tensors = await self._tensors(file)
            except SourceError:
                return  # logged where it was fetched
            except MalformedHeaderError as error:
                log.warning(
                    "%s: prefetched by offset, its header is not valid: %s", file.key, error
                )
                tensors = ()
        self._prefetcher.set_tensors(file.inode, tensors)
        self._fetcher.pump()

    async def _tensors(self, file: File) -> Sequence[Tensor]:
        """The tensors of a file, none if they are not worth it.

        Raises:
            SourceError: its header cannot be had.
            MalformedHeaderError: it is not valid.
        """
        if not file.size_bytes:
            raise MalformedHeaderError("the file is empty")
        header = await self._fetcher.header(file)
        if header is None:
            log.info("%s: prefetched by offset, its header is very long", file.key)
            return ()
        if json_cost(header) > self._parse_bytes:
            log.info("%s: prefetched by offset, its header takes much memory", file.key)
            return ()
        table = await trio.to_thread.run_sync(
            parse_header, header, file.size_bytes, limiter=self._parsing
        )
        self._known_tensors += len(table.tensors)
        if self._known_tensors > self._most_tensors:
            log.info("%s: prefetched by offset, there are very many tensors", file.key)
            return ()
        return table.tensors

    def _may_be_planned(self, file: File) -> bool:
        """Whether a shard has a size that a loader can read."""
        is_usual = block_count(file.size_bytes, self._fetcher.block_size) <= MOST_BLOCKS
        if not is_usual:
            log.warning("%s: is not prefetched, it has %d bytes", file.key, file.size_bytes)
        return is_usual

    async def _affordable_indexes(self, files: Sequence[File]) -> dict[str, bytes]:
        """The contents of indexes by path, as far as they can be parsed within the memory limit."""
        indexes: dict[str, bytes] = {}
        left = self._parse_bytes
        for file in files:
            content = await self._content(file) if file.size_bytes <= left else None
            if content is not None and json_cost(content) <= self._parse_bytes:
                indexes[self._catalog.tree.path(file)] = content
                left -= len(content)
            elif content is not None or file.size_bytes > left:
                log.warning(
                    "%s is ignored: parsing it takes too much of --memory-limit; shards are read "
                    "in the order of their names", file.key,
                )  # fmt: skip
        return indexes

    async def _content(self, file: File) -> bytes | None:
        """The bytes of a file; None if they cannot be read."""
        size, block_size = file.size_bytes, self._fetcher.block_size
        parts = []
        for span in spans(0, size, size, block_size):
            try:
                parts.append(bytes(await self._fetcher.read(file, span, reader=False)))
            except SourceError:
                return None  # logged where it was fetched; its readers get the error
        return b"".join(parts)
