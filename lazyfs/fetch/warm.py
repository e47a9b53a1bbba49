"""Fills the cache before mounts need it, with the files that a loader will read or with named ones.

It can run beside mounts and beside itself: blocks that other processes fetch are left to them and
checked again. Started again, it continues where it stopped, because it fetches only missing blocks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from posixpath import basename
from typing import TypeVar, TypeVarTuple

import trio

from lazyfs.blocks import BlockId, block_count, block_length, spans
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.memory import BlockMemory
from lazyfs.cache import CARE_S, BlockCache, Claim
from lazyfs.cache.disk_calls import MOST_OTHERS, DiskCalls, DiskHangsError
from lazyfs.cache.other_daemons import LEASE_S
from lazyfs.errors import LazyfsError, ObjectChangedError, ObjectGoneError, SourceError
from lazyfs.faults import the_error
from lazyfs.fetch.block_getter import BlockGetter
from lazyfs.listed_object import File
from lazyfs.model.directory import ModelFile
from lazyfs.model.filenames import format_of, is_projector
from lazyfs.model.layout import ModelLayout, layouts
from lazyfs.model.soundness import is_pointer, look_at
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.tree import Directory
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.options.option_types import format_size, matches
from lazyfs.store import checksum
from lazyfs.store.checksum import ObjectSum
from lazyfs.store.protocol import Store
from lazyfs.threads import Threads

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# A disk that does not answer for so long hangs. It may be slow, and have many blocks to write.
DISK_PATIENCE_S = 60.0
# How often a block that another process claimed is checked again.
LOOK_S = 0.05
# A damaged block is fetched and verified again.
ROUNDS = 2
# Files of which the beginnings are read from the cache concurrently.
READERS = 4


class IncompleteError(LazyfsError):
    """Something is missing in the cache."""


@dataclass
class Progress:
    """The progress. In bytes, unless the name says otherwise."""

    total_bytes: int = 0
    done_bytes: int = 0
    fetched_bytes: int = 0
    verified_bytes: int = 0
    files: int = 0
    compared_files: int = 0
    damaged_blocks: int = 0
    problems: list[str] = field(default_factory=list)


class Warmer:
    """Fills the cache with one source.

    Args:
        source: where from.
        catalog: what there is.
        cache: opened for this alone: its claims are to stand against those of the mounts.
        options: how to fetch.
    """

    def __init__(
        self, source: Store, catalog: Catalog, cache: BlockCache, options: MountOptions
    ) -> None:
        self.progress = Progress()
        self._source = source
        self._catalog = catalog
        self._cache = cache
        self._block_size = options.block_size
        self._include = options.include
        memory = BlockMemory(
            options.memory_limit, options.block_size, BlockMap(options.block_size), lambda: 1
        )
        self._threads = Threads(options.max_concurrency)
        self._calls = DiskCalls(self._threads, memory, cache.name)
        # A call that waits for others is not made yet: on a slow disk that takes minutes.
        self._at_once = trio.CapacityLimiter(MOST_OTHERS)
        self._getter = BlockGetter(
            source, memory, options, self._threads, _nothing, Recorder("off")
        )
        self._io_timeout = options.io_timeout
        # Half of the memory for blocks on their way, half for second attempts and writing.
        self._most_at_once = max(2, options.memory_limit // options.block_size // 2)
        self._under_way = 0
        self._ended = trio.Event()
        self._plan: list[File] = []
        # Of the plan: inodes of weights, and why no loader can load a model.
        self._weights: set[int] = set()
        self._broken: list[str] = []
        self._queue: deque[BlockId] = deque()
        self._leases: dict[BlockId, float] = {}
        self._files: dict[int, File] = {}
        self._given_up: set[int] = set()
        self._has_no_room = False

    async def run(self, include: tuple[str, ...], *, verify: bool) -> None:
        """Fetch everything that matches, and check that it is in the cache.

        Args:
            include: patterns of paths or names; none: what a loader of the models reads, or
                everything where there is no model.
            verify: read all of it back, and compare whole objects with S3's checksums.

        Raises:
            SourceError: what there is could not be listed.
            IncompleteError: something is missing, or a model is broken.
            OptionError: it cannot be verified here.
        """
        if verify:
            checksum.check_available()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._calls.watch)
                await self._run(include, verify=verify)
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise the_error(group) from None

    async def _run(self, include: tuple[str, ...], *, verify: bool) -> None:
        self._broken = []
        self._plan = await self._choose(include)
        self.progress.files = len(self._plan)
        self.progress.total_bytes = sum(file.size_bytes for file in self._plan)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._care)
            for _ in range(ROUNDS):
                await self._fill()
                if not verify or not await self._verify():
                    break
            nursery.cancel_scope.cancel()
        await self._on_disk(self._cache.care, self._plan)
        await self._see_what_is_there()
        missing = self.progress.total_bytes - self.progress.done_bytes
        if not missing and not include:
            self._broken += await self._threads.run(self._find_broken)
        if missing or self.progress.problems or self._broken:
            raise IncompleteError(self._why(missing))

    async def _choose(self, include: tuple[str, ...]) -> list[File]:
        await self._list_all(self._catalog.tree.root)
        files = {self._catalog.tree.path(file): file for file in self._catalog.tree.files()}
        if include:
            chosen = [file for path, file in files.items() if matches(path, include)]
            if not chosen:
                raise IncompleteError(
                    f"{self._source.url}: no file matches {' or '.join(map(repr, include))}"
                )
            return chosen
        listed = [ModelFile(path, file.size_bytes) for path, file in files.items()]
        include = self._include
        found = _models(layouts(listed, include=include))
        if not found:
            self._weights = {
                file.inode for file in files.values() if file.size_bytes and format_of(file.name)
            }
            return list(files.values())
        paths = [path for layout in found for path in layout.index_paths]
        indexes = {path: await self._content(files[path]) for path in paths}
        found = _models(layouts(listed, indexes=indexes, include=include))
        for layout in found:
            self._broken += layout.problems
            for warning in layout.warnings:
                log.warning("%s", warning)
        self._weights = {files[path].inode for layout in found for path in layout.shards}
        paths = [
            path
            for part in ("small", "shards")
            for layout in found
            for path in getattr(layout, part)
        ]
        # One of several projectors is loaded, and nothing says which.
        paths += [
            each.path
            for layout in found
            for each in layout.excluded
            if each.path not in layout.alternatives and is_projector(basename(each.path))
        ]
        return [files[path] for path in paths]

    def _find_broken(self) -> list[str]:
        """Why files of the models are broken; all of them are in the cache. Blocks."""
        files = {self._catalog.tree.path(file): file for file in self._plan}

        def read(path: str, offset: int, length: int) -> bytes:
            parts = []
            for span in spans(offset, length, files[path].size_bytes, self._block_size):
                data = self._cache.load(files[path], span.number)
                if data is None:
                    raise ObjectGoneError(f"{path}: it was dropped from the cache meanwhile")
                parts.append(bytes(data[span.start : span.stop]))
            return b"".join(parts)

        def broken(path: str) -> str | None:
            file = files[path]
            if file.inode in self._weights:
                return look_at(path, file.size_bytes, read).broken
            return is_pointer(path, file.size_bytes, read)

        with ThreadPoolExecutor(READERS) as pool:
            return [why for why in pool.map(broken, files) if why]

    async def _list_all(self, directory: Directory) -> None:
        for node in (await self._catalog.children(directory)).values():
            if isinstance(node, Directory):
                await self._list_all(node)

    async def _content(self, file: File) -> bytes:
        """A whole file, small enough for memory: an index."""
        parts = []
        for number in range(block_count(file.size_bytes, self._block_size)):
            found = await self._on_disk(self._cache.load_or_claim, file, number)
            if isinstance(found, Claim):
                found = await self._get(file, number)
                await self._on_disk(self._cache.put, file, number, found)
            parts.append(bytes(found))
        return b"".join(parts)

    async def _fill(self) -> None:
        self._has_no_room = False
        await self._on_disk(self._cache.announce, self._plan)
        missing = await self._see_what_is_there()
        self._queue = deque(missing)
        async with trio.open_nursery() as nursery:
            while not self._has_no_room and (self._queue or self._under_way):
                limit = min(self._getter.limit, self._most_at_once)
                if self._queue and self._under_way < limit:
                    self._under_way += 1
                    nursery.start_soon(self._bring, self._queue.popleft())
                else:
                    self._ended = trio.Event()
                    await self._ended.wait()

    async def _see_what_is_there(self) -> list[BlockId]:
        """Count the blocks on disk; returns those that are missing."""
        missing = []
        self.progress.done_bytes = 0
        for file in self._plan:
            self._files[file.inode] = file
            there = set(await self._on_disk(self._cache.present, file))
            for number in range(block_count(file.size_bytes, self._block_size)):
                if number in there:
                    self.progress.done_bytes += self._length(file, number)
                else:
                    missing.append(BlockId(file.inode, number))
        return missing

    async def _bring(self, block: BlockId) -> None:
        file = self._files[block.inode]
        try:
            if block.inode not in self._given_up and not self._has_no_room:
                await self._bring_one(file, block)
        except SourceError as error:
            self._cache.release(file, block.number)
            if block.inode not in self._given_up:
                self._given_up.add(block.inode)
                self.progress.problems.append(str(error))
        finally:
            self._under_way -= 1
            self._ended.set()

    async def _bring_one(self, file: File, block: BlockId) -> None:
        if not await self._on_disk(self._cache.holds, file, block.number):
            found = await self._on_disk(self._cache.load_or_claim, file, block.number)
            lease_until = self._leases.setdefault(block, trio.current_time() + LEASE_S)
            if found is Claim.THEIRS and trio.current_time() < lease_until:
                await trio.sleep(LOOK_S)
                self._queue.append(block)
                return
            if isinstance(found, Claim):
                data = await self._get(file, block.number)
                self.progress.fetched_bytes += len(data)
                if not await self._on_disk(self._cache.put, file, block.number, data):
                    self._has_no_room = True
                    return
        self.progress.done_bytes += self._length(file, block.number)

    async def _get(self, file: File, number: int) -> memoryview:
        got = await self._getter.get(
            file,
            number * self._block_size,
            self._length(file, number),
            patience_s=lambda: self._io_timeout,
            saturated=lambda: self._under_way >= self._getter.limit,
        )
        return got.data

    async def _verify(self) -> int:
        """Read everything back. Returns how many blocks were damaged and have been removed."""
        self.progress.verified_bytes = self.progress.compared_files = 0
        damaged = 0
        for file in self._plan:
            if file.inode not in self._given_up:
                damaged += await self._verify_one(file)
        self.progress.damaged_blocks += damaged
        return damaged

    async def _verify_one(self, file: File) -> int:
        damaged = 0
        whole: ObjectSum | None = None
        try:
            whole = await self._threads.run(self._source.checksum, file)
        except (ObjectChangedError, ObjectGoneError) as error:
            self.progress.problems.append(str(error))
            return 0
        except SourceError as error:  # reading needs no HEAD, which a policy may deny
            self.progress.problems.append(f"not compared with a checksum of S3: {error}")
        for number in range(block_count(file.size_bytes, self._block_size)):
            data = await self._on_disk(self._cache.load, file, number)
            if data is None:
                damaged += 1
                continue
            self.progress.verified_bytes += len(data)
            if whole is not None and not damaged:
                await self._threads.run(whole.update, data)
        if whole is not None and not damaged:
            if whole.matches:
                self.progress.compared_files += 1
            else:
                await self._on_disk(self._cache.drop, file)
                self.progress.problems.append(
                    f"{self._source.name(file.key)}: what was fetched has not the "
                    f"{whole.kind} checksum that S3 keeps of it; dropped from the cache"
                )
        return damaged

    def _why(self, missing: int) -> str:
        total = format_size(self.progress.total_bytes)
        if missing:
            what = f"{self._source.url}: {format_size(missing)} of {total} are not in the cache"
        elif self.progress.problems:
            what = f"{self._source.url}: all {total} are in the cache, but not all is verified"
        else:
            what = f"{self._source.url}: all {total} are in the cache, but the model is broken"
        if problems := self.progress.problems + self._broken:
            more = len(problems) - 1
            what += f": {problems[0]}" + (f" (and {more} more)" if more else "")
        elif self._has_no_room:
            what += ": there is no room for them; see --cache-size, --cache-reserve and the log"
        return what

    async def _on_disk(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Make a call of the cache. Raises IncompleteError: its disk does not answer."""
        try:
            async with self._at_once:
                return await self._calls.run(function, *arguments, patience_s=DISK_PATIENCE_S)
        except DiskHangsError:
            raise IncompleteError(
                f"the disk of the cache {self._cache.name} does not answer; try again when it does"
            ) from None

    async def _care(self) -> None:
        while True:
            await trio.sleep(CARE_S)
            with contextlib.suppress(DiskHangsError):  # who waits for a call says so
                await self._calls.run(self._cache.care, self._plan, patience_s=math.inf)

    def _length(self, file: File, number: int) -> int:
        return block_length(file.size_bytes, self._block_size, number)


def _nothing() -> None:
    """Does nothing: no request waits for the room of a second attempt."""


def _models(found: Sequence[ModelLayout]) -> list[ModelLayout]:
    """The layouts that make up models, without those that only have small files."""
    groups = {layout.group for layout in found if layout.shards or layout.problems}
    return [layout for layout in found if layout.group in groups]
