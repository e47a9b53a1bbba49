"""Whether S3 lists what a mount shows: comparisons, doubts, and how often S3 is asked."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from memory_store import MemoryStore

from lazyfs.control import snapshot as module
from lazyfs.control.snapshot import Snapshot
from lazyfs.errors import UnavailableError
from lazyfs.handover.handover import new_carried
from lazyfs.handover.runtime_changes import RuntimeChanges
from lazyfs.listed_object import ListedObject
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.namespace.relisting import lists_the_same
from lazyfs.namespace.tree import Directory
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.listing_page import Page

NOW = {"max_age_s": 0, "timeout_s": 30}


class Store(MemoryStore):
    """Counts listings, and gives none while it is down."""

    def __init__(self, objects: dict[str, bytes], page_size: int = 1000) -> None:
        super().__init__(objects, page_size)
        self.listings = 0
        self.is_down = False
        self.tags = True

    def list_page(self, *arguments: Any, **named: Any) -> Page:
        self.listings += 1
        if self.is_down:
            raise UnavailableError("S3 is away")
        return super().list_page(*arguments, **named)

    def listed(self, key: str) -> ListedObject:
        listed = super().listed(key)
        if self.tags:
            return listed
        times = len(self.objects[key]) * 10**9
        return ListedObject(key, 1, "", times, key)


async def catalog_of(store: Store, options: MountOptions | None = None) -> Catalog:
    catalog = Catalog(store, options or MountOptions(), ListingLog(), Recorder("model"))
    await catalog.open()
    return catalog


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test)


@pytest.mark.parametrize(
    "change",
    [
        {"new": b""},
        {"d/new": b""},
        {"a": b"another"},
        {"a": None},
        {"a": None, "a/b": b""},
        {"e/f": b""},
    ],
    ids=str,
)
@pytest.mark.parametrize("page_size", [2, 1000])
def test_changes_that_are_noticed(change: dict[str, bytes | None], page_size: int) -> None:
    async def test() -> None:
        store = Store({"a": b"1", "b": b"2", "d/c": b"3", "d/e/f": b"4"}, page_size)
        catalog = await catalog_of(store)
        for directory in await directories(catalog, catalog.tree.root):
            await catalog.children(directory)
        assert await lists_the_same(catalog)
        for key, body in change.items():
            if body is None:
                del store.objects[key]
            else:
                store.objects[key] = body
        assert not await lists_the_same(catalog)
        assert await lists_the_same(await catalog_of(store))

    run(test)


async def directories(catalog: Catalog, root: Directory) -> list[Directory]:
    found = [root]
    for node in (await catalog.children(root)).values():
        if isinstance(node, Directory):
            found += await directories(catalog, node)
    return found


def test_changes_that_do_not_count() -> None:
    """Files that the mount does not show, and directories that nobody has seen."""

    async def test() -> None:
        store = Store({"a/1": b"", "b/1": b"", "c": b""}, page_size=2)
        catalog = await catalog_of(store, MountOptions(exclude=("*.lock",)))
        await catalog.children(catalog.tree.root)
        store.objects |= {"model.lock": b"", "b/2": b""}
        assert await lists_the_same(catalog)
        store.objects["d/1"] = b""
        assert not await lists_the_same(catalog)

    run(test)


def test_the_first_page_of_a_large_source_counts_before_its_root_is_listed() -> None:
    async def test() -> None:
        store = Store({f"d/{number}": b"" for number in range(5)}, page_size=2)
        catalog = await catalog_of(store)
        assert await lists_the_same(catalog)
        store.objects["d/0"] = b"replaced"
        assert not await lists_the_same(catalog)

    run(test)


def test_without_etags_size_and_time_tell_versions_apart() -> None:
    async def test() -> None:
        store = Store({"a": b"1"})
        store.tags = False
        catalog = await catalog_of(store)
        assert await lists_the_same(catalog)
        store.objects["a"] = b"22"
        assert not await lists_the_same(catalog)

    run(test)


def snapshot_of(catalog: Catalog, carried: RuntimeChanges | None = None) -> Snapshot:
    return Snapshot(catalog, carried or RuntimeChanges(new_carried()), 0, time.monotonic())


def test_an_answer_is_reused_up_to_its_allowed_age() -> None:
    async def test() -> None:
        store = Store({"a": b""})
        snapshot = snapshot_of(await catalog_of(store))
        asked = store.listings
        hour = {"max_age_s": 3600, "timeout_s": 30}
        assert await snapshot.compare(hour) == {"same": True, "why": ""}
        assert store.listings == asked, "the mount itself is not older"
        store.objects["b"] = b""
        assert (await snapshot.compare(hour))["same"] is True
        assert (await snapshot.compare(NOW))["same"] is False
        assert (await snapshot.compare(hour))["same"] is False
        assert store.listings == asked + 1
        assert (snapshot.describe()["same"], snapshot.describe()["doubt"]) == (False, None)

    run(test)


def test_concurrent_questions_share_an_answer() -> None:
    async def test() -> None:
        store = Store({"a": b""})
        snapshot = snapshot_of(await catalog_of(store))
        asked = store.listings
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(snapshot.compare, NOW)
        # Who came while S3 was being asked must not get what it said before.
        assert store.listings - asked in (1, 2)

    run(test)


def test_a_failed_listing_is_not_repeated_at_once() -> None:
    async def test() -> None:
        store = Store({"a": b""})
        snapshot = snapshot_of(await catalog_of(store))
        store.is_down = True
        asked = store.listings
        for _ in range(3):
            assert await snapshot.compare(NOW) == {"same": None, "why": "S3 is away"}
        assert store.listings == asked + 1

    run(test)


def test_a_listing_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: Catalog) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async def test() -> None:
        snapshot = snapshot_of(await catalog_of(Store({"a": b""})))
        monkeypatch.setattr(module, "lists_the_same", hang)
        answer = await snapshot.compare({"max_age_s": 0, "timeout_s": 0.01})
        assert answer == {"same": None, "why": "S3 has not answered within 0.01 s"}

    run(test)


def test_a_doubt_is_carried_on_and_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever S3 listed meanwhile: the last answer counts."""
    monkeypatch.setattr(module, "REST_S", 0)

    async def at_once(call: Callable[[], Any], **_: Any) -> Any:
        return call()

    # Threads do not live in modelled time.
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)

    async def test() -> None:
        store = Store({"a": b""})
        catalog = await catalog_of(store)
        carried = RuntimeChanges(new_carried())
        snapshot_of(catalog, carried).note_doubt({"why": "S3 was away"})
        later = RuntimeChanges(carried.descriptor)
        snapshot = Snapshot(catalog, later, 0, None)
        assert snapshot.describe()["doubt"] == "S3 was away"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshot.settle)
            store.objects["b"] = b""
            await trio.sleep(1.5 * module.PAUSE_S)
            described = snapshot.describe()
            assert (described["same"], described["doubt"]) == (False, "S3 was away")
            store.is_down = True
            await trio.sleep(module.PAUSE_S)
            assert snapshot.describe()["doubt"] == "S3 was away"
            store.is_down = False
            del store.objects["b"]
            await trio.sleep(module.PAUSE_S)
            assert (snapshot.describe()["same"], snapshot.describe()["doubt"]) == (True, None)
            asked = store.listings
            await trio.sleep(10 * module.PAUSE_S)
            assert store.listings == asked, "S3 is asked only while there is a doubt"
            nursery.cancel_scope.cancel()

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("body", [{}, {"max_age_s": "1", "timeout_s": 1}, {"max_age_s": 1}])
def test_invalid_requests(body: dict[str, Any]) -> None:
    async def test() -> None:
        snapshot = snapshot_of(await catalog_of(Store({"a": b""})))
        with pytest.raises(ValueError):
            await snapshot.compare(body)
        with pytest.raises(ValueError):
            snapshot.note_doubt({})

    run(test)
