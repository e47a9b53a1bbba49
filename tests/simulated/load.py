"""One load in modelled time."""

from __future__ import annotations

import random
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast
from unittest import mock

import trio
import trio.testing

from lazyfs.blocks import Span, block_length, spans
from lazyfs.blocks.block_map import BlockMap
from lazyfs.cache import BlockCache
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.listed_object import File, ListedObject
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.tree import Directory, Node, Tree
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import PLANNED, MountOptions
from lazyfs.pagecache.page_cache import PageCache
from lazyfs.prefetch.planner import Planner
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.protocol import Store
from lazyfs.threads import Threads as WorkerThreads
from simulated.loaders import Job, Loader, Read
from simulated.machine import PAGE, Bucket, Disk, Link, Machine, Movers, Pages, Threads
from simulated.models import Model

# When the walk over the mount has shown all files to the kernel.
KNOWN_S = 0.3
# From an open to the first read of a file.
OPENING_S = 0.001
LONGEST_S = 7200
# Blocks that are asked for together come together: their order does not matter.
AT_ONCE = 16
# What is chosen on a machine with two processors.
SMALL = {"memory-limit": "256MiB", "max-concurrency": "64", "movers": "0"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a load was like.

    Attributes:
        seconds: from its first read to its last.
        ideal_s: the least that it could take: of the link, which brings before the load as much as
            there is room for if the policy is to have all of the model, and of the loader with
            everything at hand.
        needed_bytes: of the blocks of tensors that it touched.
        fetched_bytes: that the link carried.
        wasted_bytes: of blocks that were fetched and not touched, and of heads, which blocks bring
            once more.
        twice: blocks that were asked for more than once.
        inversions: blocks that were asked for after more than `AT_ONCE` that were needed later.
        requests: reads through FUSE.
        first_s: when the first file that is no configuration was read to its end.
    """

    seconds: float
    ideal_s: float
    needed_bytes: int
    fetched_bytes: int
    wasted_bytes: int
    twice: int
    inversions: int
    requests: int
    first_s: float

    @property
    def stall(self) -> float:
        """The time over the ideal, as a share of it."""
        return self.seconds / self.ideal_s - 1

    @property
    def waste(self) -> float:
        """The bytes that nobody read, as a share of those that were needed."""
        return self.wasted_bytes / self.needed_bytes


def simulate(
    model: Model,
    loader: Loader,
    machine: Machine | None = None,
    options: MountOptions | None = None,
    *,
    starts_s: float = 0.0,
    again: bool = False,
) -> Report:
    """Mount a model, let a loader begin after `starts_s`, and measure until it has all it wants.

    Args:
        again: measure another load in the same mount, after the kernel has forgotten all inodes.
    """
    options = options or MountOptions.parse(("{name}", SMALL))
    load = _Load(model, loader, machine or Machine(), options, starts_s, again)
    clock = trio.testing.MockClock(autojump_threshold=0)
    with (
        mock.patch("trio.to_thread.run_sync", load.threads.run_sync),
        mock.patch("lazyfs.threads.Threads.run_first", WorkerThreads.run),
        # As Hypothesis and pytest-trio do it: the same order of tasks each time.
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch("trio._core._run._r", random.Random(0)),
    ):
        trio.run(load.run, clock=clock)
    return load.report()


class _Catalog:
    """In the place of `Catalog`: all is listed already."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    async def children(self, directory: Directory) -> dict[str, Node]:
        return directory.children or {}


class _Load:
    def __init__(
        self, model: Model, loader: Loader, machine: Machine, options: MountOptions,
        starts_s: float, again: bool,
    ) -> None:  # fmt: skip
        self._loader = loader
        self._again = again
        self._machine = machine
        self._starts_s = starts_s
        # What can be on this machine before anyone has read anything; a part of the memory is for
        # demand and for headers, and what is pushed into the page cache is on the disk as well.
        self._room = (machine.disk or machine.pages // 2) + int(0.7 * options.memory_limit)
        self._block_size = options.block_size
        self.threads = Threads()
        self._link = Link(machine)
        tree = Tree("")
        listed = [ListedObject(key, size, "e", 0, key) for key, size in sorted(model.sizes.items())]
        tree.plant(tree.root, listed, [], whole=True)
        self._files: dict[str, File] = {tree.path(file): file for file in tree.files()}
        movers = Movers(machine)
        self._bucket = Bucket(
            model.contents, options.block_size, self._link, self.threads, machine, movers
        )
        self._pages = Pages(machine, options.block_size, self.threads, movers)
        disk = Disk(machine, self.threads, movers) if machine.disk else None
        prefetcher = Prefetcher(options.prefetch, BlockMap(options.block_size))
        recorder = Recorder(options.prefetch)
        self._fetcher = BlockFetcher(
            cast(Store, self._bucket),
            cast(BlockCache | None, disk),
            cast(PageCache, self._pages),
            prefetcher,
            options,
            recorder,
        )
        catalog = cast(Catalog, _Catalog(tree))
        self._planner = Planner(catalog, self._fetcher, prefetcher, recorder, options)
        self._plans = options.prefetch in PLANNED
        self._has_all = options.prefetch == "model"
        self._touched: dict[tuple[str, int], int] = {}
        self._opened: set[str] = set()
        # When something of a file was read last, in the order in which they were opened.
        self._read_s: dict[str, float] = {}
        self._requests = 0
        self._seconds = 0.0
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        for file in self._files.values():
            self._pages.add(file)
        with trio.fail_after(LONGEST_S):
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._link.run)
                self._fetcher.start(nursery)
                if self._plans:
                    nursery.start_soon(self._planner.run)
                nursery.start_soon(self._become_known)
                await trio.sleep(self._starts_s)
                await self._load()
                if self._again:
                    self._forget_inodes()
                    await self._load()
                nursery.cancel_scope.cancel()

    async def _load(self) -> None:
        began_s = trio.current_time()
        async with trio.open_nursery() as workers:
            for queue in self._loader.queues:
                jobs = iter(queue.jobs)
                for _ in range(queue.workers):
                    workers.start_soon(self._work, jobs)
        self._seconds = trio.current_time() - began_s

    def _forget_inodes(self) -> None:
        """What the kernel does when it is short of memory: the pages go with the inodes."""
        for file in self._files.values():
            self._pages.forget(file.inode)
            self._fetcher.set_known(file, False)
        self._opened.clear()
        self._bucket.forget()

    async def _become_known(self) -> None:
        await trio.sleep(KNOWN_S)
        for file in self._files.values():
            self._fetcher.set_known(file, True)

    async def _work(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            for step in job:
                if len(step) == 1:
                    await self._stream(step[0])
                    continue
                async with trio.open_nursery() as streams:
                    for stream in step:
                        streams.start_soon(self._stream, stream)

    async def _stream(self, stream: Iterable[Read]) -> None:
        for read in stream:
            await self._read(self._files[read.path], read)

    async def _read(self, file: File, read: Read) -> None:
        if read.path not in self._opened:
            self._opened.add(read.path)
            self._read_s[read.path] = 0.0
            self._fetcher.set_known(file, True)
            self._fetcher.opened(file, direct=self._loader.direct)
            if self._plans:
                self._planner.opened(file)
            await trio.sleep(OPENING_S)
        if not read.asked:
            for piece in self._pieces(file, read.offset, read.size):
                self._touched.setdefault((read.path, piece.number), len(self._touched))
        if self._loader.direct:
            await self._ask(file, read.offset, read.size)
        else:
            await self._fault(file, read)
        await trio.sleep(read.size / self._loader.rate)
        self._read_s[read.path] = trio.current_time() - self._starts_s

    async def _fault(self, file: File, read: Read) -> None:
        """Until the pages are there; the kernel asks for what is absent of `asked` bytes.

        Whoever waited for a page has it, even if the kernel drops it right after that.
        """
        asked = range(read.offset // PAGE, -(-(read.offset + (read.asked or read.size)) // PAGE))
        if self._pages.has(file.inode, read.offset, read.size):
            return
        while run := self._pages.lock_absent(file.inode, asked.start, asked.stop):
            await self._pages.background.acquire()
            assert self._nursery is not None
            self._nursery.start_soon(self._answer, file, *run)
        for page in range(asked.start, -(-(read.offset + read.size) // PAGE)):
            await self._pages.wait_until_unlocked(file.inode, page)

    async def _answer(self, file: File, first: int, last: int) -> None:
        await self._ask(file, first * PAGE, (last - first) * PAGE)
        self._pages.unlock(file.inode, first, last)
        self._pages.background.release()

    async def _ask(self, file: File, offset: int, size: int) -> None:
        """What the daemon does for one read."""
        self._requests += 1
        self._fetcher.was_read(file, offset, size)
        for piece in self._pieces(file, offset, size):
            data = await self._fetcher.read(file, piece)
            assert len(data) == piece.stop - piece.start, "the kernel takes it for the end"
        await trio.sleep(self._machine.request_s + size / self._machine.request)

    def _pieces(self, file: File, offset: int, size: int) -> Iterator[Span]:
        return spans(offset, size, file.size_bytes, self._block_size)

    def report(self) -> Report:
        # A block may lack its beginning, which came as a long header.
        parts = [
            ((key, start // self._block_size), length)
            for key, start, length in self._bucket.asked
            if (start + length) % self._block_size == 0
            or start + length == self._files[key].size_bytes
        ]
        asked = [block for block, _ in parts]
        heads = sum(length for *_, length in self._bucket.asked) - sum(size for _, size in parts)
        idle = set(asked) - set(self._touched)
        unsent = sum(self._bucket.unsent[key, number * self._block_size] for key, number in idle)
        needed = sum(self._length(*block) for block in self._touched)
        early = min(self._starts_s * self._machine.link, self._room) if self._has_all else 0.0
        link_s = self._machine.latency_s + max(0.0, needed - early) / self._machine.link
        order = [self._touched[block] for block in asked if block in self._touched]
        shortest_s = self._loader.shortest_s()
        return Report(
            seconds=self._seconds,
            ideal_s=max(shortest_s, link_s),
            needed_bytes=needed,
            fetched_bytes=self._bucket.sent_bytes,
            wasted_bytes=heads + sum(self._length(*block) for block in idle) - unsent,
            twice=len(asked) - len(set(asked)),
            inversions=_inversions(order),
            requests=self._requests,
            first_s=next(at for path, at in self._read_s.items() if not path.endswith(".json")),
        )

    def _length(self, path: str, number: int) -> int:
        return block_length(self._files[path].size_bytes, self._block_size, number)


def _inversions(order: Iterable[int]) -> int:
    """How many come after more than `AT_ONCE` that are greater."""
    before: list[int] = []
    count = 0
    for number in order:
        count += len(before) - bisect_right(before, number) > AT_ONCE
        insort(before, number)
    return count
