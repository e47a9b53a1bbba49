"""Sources of many objects: the loop is not held up by listings and plans of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from lazyfs.blocks import BlockId
from lazyfs.blocks.block_map import BlockMap
from lazyfs.blocks.file_blocks import Place
from lazyfs.fetch.fetcher import BlockFetcher
from lazyfs.listed_object import File, ListedObject
from lazyfs.model.directory import SMALL_COUNT
from lazyfs.namespace import listing_log
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.namespace.tree import STEP, Tree
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.prefetch import found_models
from lazyfs.prefetch.planner import Planner
from lazyfs.prefetch.prefetcher import Prefetcher
from lazyfs.store.listing_page import Page
from lazyfs.store.protocol import Store

DIRECTORIES = 20
OPTIONS = MountOptions()


def objects(*keys: str) -> list[ListedObject]:
    return [ListedObject(key, 9, "e", 0, key) for key in keys]


class Bucket:
    """Lists pages as they were given to it, in that order."""

    url = SimpleNamespace(bucket="b", prefix="")

    def __init__(self, *pages: Page) -> None:
        self._pages: Iterator[Page] = iter(pages)

    def name(self, key: str) -> str:
        return key

    def list_page(self, prefix: str, token: str | None, **_: Any) -> Page:
        return next(self._pages)


class Fetcher:
    """Is told what is planned."""

    block_size = OPTIONS.block_size

    def __init__(self) -> None:
        self.scans: list[list[str]] = []

    def add_file(self, file: File) -> None: ...

    async def scan(self, files: list[File]) -> None:
        self.scans.append([file.key for file in files])

    def pump(self) -> None: ...

    def abandon(self, files: Iterable[File]) -> None: ...

    def is_coming(self, file: File) -> bool:
        return True


def catalog_of(*pages: Page) -> Catalog:
    source = cast(Store, Bucket(*pages))
    return Catalog(source, OPTIONS, ListingLog(), Recorder())


async def states_while_listed() -> set[int]:
    """How many files were there at each step of the loop while a page was taken in."""
    names = [f"d{number:02}/" for number in range(DIRECTORIES)]
    catalog = catalog_of(
        Page(objects(*(f"{name}f" for name in names)), [], "more"), Page([], list(names), None)
    )
    await catalog.open()
    seen = set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.children, catalog.tree.root)
        while catalog.tree.file_count < DIRECTORIES - 1:  # the last one may go on in the next page
            seen.add(catalog.tree.file_count)
            await trio.lowlevel.checkpoint()
    return seen


def test_requests_are_answered_between_the_directories_of_a_page() -> None:
    assert len(trio.run(states_while_listed)) > DIRECTORIES // 2


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was taken as read, of each time that models were looked for."""
    looked: list[tuple[str, ...]] = []
    find = found_models.layouts

    def layouts(files: Any, **about: Any) -> Any:
        looked.append(tuple(about["read"]))
        return find(files, **about)

    monkeypatch.setattr(found_models, "layouts", layouts)
    return looked


async def plan(opened: list[str], keys: list[str]) -> list[list[str]]:
    """What is planned, each time, while files are opened and read one after the other."""
    catalog = catalog_of(Page(objects(*keys), [], None))
    await catalog.open()
    fetcher, prefetcher = Fetcher(), Prefetcher("model", BlockMap(OPTIONS.block_size))
    made = Planner(catalog, cast(BlockFetcher, fetcher), prefetcher, Recorder(), OPTIONS)
    files = {file.key: file for file in catalog.tree.files()}
    for file in files.values():
        prefetcher.blocks.add_file(file.inode, file.size_bytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        for key in opened:
            await trio.testing.wait_all_tasks_blocked(0.05)
            made.opened(files[key])
            prefetcher.was_read(files[key].inode, 0, 9)
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    return fetcher.scans


def test_models_are_looked_for_once_however_many_are_opened(
    counted: list[tuple[str, ...]],
) -> None:
    names = [f"m{number}" for number in range(5)]
    keys = [f"{name}/{file}" for name in names for file in ("a.safetensors", "config.json")]
    planned = trio.run(plan, [f"{name}/config.json" for name in names], keys)
    assert sorted(planned[-1]) == sorted(keys)
    assert counted == [()]


def test_very_many_files_without_weights_are_not_planned(
    counted: list[tuple[str, ...]],
) -> None:
    keys = [f"{number:04}.txt" for number in range(2 * SMALL_COUNT)]
    assert trio.run(plan, keys[:5], keys) == [[]], "one plan, of nothing"
    assert counted == [()]


async def plan_of_reads(keys: list[str], near: list[str], reads: list[str]) -> list[str]:
    """The last plan, after some files went into the page cache and were opened, and others read."""
    size = 64 << 20
    listed = [ListedObject(key, size, "e", 0, key) for key in keys]
    catalog = catalog_of(Page(listed, [], None))
    await catalog.open()
    fetcher, prefetcher = Fetcher(), Prefetcher("model", BlockMap(OPTIONS.block_size))
    made = Planner(catalog, cast(BlockFetcher, fetcher), prefetcher, Recorder(), OPTIONS)
    files = {file.key: file for file in catalog.tree.files()}
    for file in files.values():
        prefetcher.blocks.add_file(file.inode, file.size_bytes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked(0.05)
        for key in near:
            prefetcher.blocks.opened(files[key].inode, direct=False)
            prefetcher.blocks.moved(BlockId(files[key].inode, 3), Place.NEAR)
        for key in reads:
            offset = size // 2 if key.endswith("!") else 0
            made.opened(files[key.strip("!")])
            for at in (offset, offset + (1 << 20)):
                prefetcher.was_read(files[key.strip("!")].inode, at, 1 << 20)
            await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    return sorted(fetcher.scans[-1])


SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
SECOND = [f"consolidated.0{n}.pth" for n in (0, 1)]
CHECKPOINTS = [f"{name}.gguf" for name in "abc"]


@pytest.mark.parametrize(
    ("keys", "near", "reads", "planned"),
    [
        (SHARDS + SECOND, [], [SECOND[0]], SECOND),
        (SHARDS + SECOND, [SHARDS[0]], [f"{SECOND[0]}!"], SHARDS + SECOND),
        (SHARDS + SECOND, [], [SHARDS[1] + "!", f"{SECOND[0]}!"], SHARDS + SECOND),
        ([*SHARDS, "vae.pth", "more.gguf"], [], ["vae.pth!"], [*SHARDS, "vae.pth"]),
        (CHECKPOINTS, [], CHECKPOINTS, []),
        (CHECKPOINTS, [], [*CHECKPOINTS, "b.gguf!"], ["b.gguf"]),
    ],
    ids=["followed", "read as pages", "read as well", "component", "looked at", "loaded"],
)
def test_lazyfs_reads_ahead_in_files_that_are_read(
    keys: list[str], near: list[str], reads: list[str], planned: list[str]
) -> None:
    assert trio.run(plan_of_reads, keys, near, reads) == sorted(planned)


# A directory of many objects, listed page by page.
PAGES, EACH = 12, 1000


def large_directory(journal: ListingLog | None = None) -> Catalog:
    names = [[f"{page:02}-{number:04}" for number in range(EACH)] for page in range(PAGES)]
    pages = [
        Page(objects(*of_page), [], str(page) if page + 1 < PAGES else None)
        for page, of_page in enumerate(names)
    ]
    # The first page again: it is asked for at mount, without a delimiter.
    source = cast(Store, Bucket(pages[0], *pages))
    return Catalog(source, OPTIONS, journal or ListingLog(), Recorder())


class Steps(trio.abc.Instrument):
    """How many names were written or planted in each step of a task in which some were."""

    def __init__(self) -> None:
        self.names = [0]

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.names[-1]:
            self.names.append(0)

    def counting(self, function: Callable[..., Any], names: Callable[..., int]) -> Any:
        def counted(*arguments: Any) -> Any:
            self.names[-1] += names(*arguments)
            return function(*arguments)

        return counted


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps()
    planted = found.counting(Tree._plant_object, lambda *_: 1)
    written = found.counting(
        listing_log.json.dumps, lambda value: len(value) if isinstance(value, list) else 0
    )
    monkeypatch.setattr(Tree, "_plant_object", planted)
    monkeypatch.setattr(listing_log.json, "dumps", written)
    return found


def test_names_are_planted_in_short_steps_and_shown_all_at_once(steps: Steps) -> None:
    seen: set[int] = set()

    async def main() -> None:
        trio.lowlevel.add_instrument(steps)
        catalog = large_directory()
        await catalog.open()

        async def look() -> None:
            while True:
                children = catalog.tree.root.children
                seen.add(-1 if children is None else len(children))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await catalog.children(catalog.tree.root)
            await trio.sleep(0)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert sum(steps.names) == 2 * PAGES * EACH, "written and planted"
    assert max(steps.names) <= STEP
    assert seen == {-1, PAGES * EACH}


def test_a_reader_that_goes_away_while_names_are_planted_leaves_nothing(steps: Steps) -> None:
    async def main() -> None:
        trio.lowlevel.add_instrument(steps)
        journal = ListingLog()
        for limit in (5, 30, 70):  # while they are written, and while they are planted
            catalog = large_directory(journal)
            await catalog.open()
            steps.names = [0]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(catalog.children, catalog.tree.root)
                while len(steps.names) < limit:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert catalog.tree.root.children is None
            assert (catalog.tree.file_count, catalog.tree.total_bytes) == (0, 0)
            assert list(ListingLog(journal.descriptor).read()) == []
        catalog = large_directory(journal)
        await catalog.open()
        assert len(await catalog.children(catalog.tree.root)) == PAGES * EACH
        after = Catalog(cast(Store, Bucket()), OPTIONS, ListingLog(journal.descriptor), Recorder())
        after.restore()
        assert list(after.tree.files()) == list(catalog.tree.files())

    trio.run(main)
