"""Both stores do what the protocol says, and what is above them needs no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from memory_store import MemoryStore

from lazyfs.cache import BlockCache
from lazyfs.errors import ObjectChangedError, ObjectGoneError
from lazyfs.fetch.warm import Warmer
from lazyfs.namespace.catalog import Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.namespace.tree import Directory, Tree
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.store import stores
from lazyfs.store.credentials import StaticCredentials
from lazyfs.store.protocol import Store
from lazyfs.store.s3_source import S3Source
from lazyfs.store.url import SourceUrl

OBJECTS = {"config.json": b"{}", "a/w.safetensors": bytes(300_000), "a/b/c": b"x", "z/last": b"y"}


def is_a_store(store: Store) -> Store:
    """mypy says that it is one."""
    return store


def of_s3(source: S3Source) -> Store:
    return is_a_store(source)


async def shown(store: Store) -> set[str]:
    """All paths of a catalog, walked directory by directory."""
    catalog = Catalog(store, MountOptions(), ListingLog(None), Recorder("off"))
    await catalog.open()
    return await _below(catalog, catalog.tree, catalog.tree.root)


async def _below(catalog: Catalog, tree: Tree, directory: Directory) -> set[str]:
    found = set()
    for node in (await catalog.children(directory)).values():
        if isinstance(node, Directory):
            found |= await _below(catalog, tree, node)
        else:
            found.add(tree.path(node))
    return found


@pytest.mark.parametrize("page_size", [1, 2, 1000])
def test_a_tree_of_any_store(page_size: int) -> None:
    store = MemoryStore(dict(OBJECTS), page_size)
    assert trio.run(shown, is_a_store(store)) == set(OBJECTS)


def test_a_cache_is_filled_from_any_store(tmp_path: Path) -> None:
    store = MemoryStore(dict(OBJECTS))
    options = MountOptions(cache_dir=(tmp_path,), block_size=64 << 10)

    async def warm() -> None:
        catalog = Catalog(store, options, ListingLog(None), Recorder("off"))
        cache = BlockCache.of(options, store.endpoint, store.url.bucket)
        assert cache is not None
        await trio.to_thread.run_sync(cache.open)
        await Warmer(store, catalog, cache, options).run(("*",), verify=False)

    trio.run(warm)
    taken = sum(length for _, _, length in store.asked)
    assert taken == sum(map(len, OBJECTS.values())), "each byte once"


def test_an_object_that_changes_is_noticed() -> None:
    store = MemoryStore(dict(OBJECTS))
    pin = store.listed("a/b/c")
    assert store.ranges.read(pin, 0, 1) == b"x"
    store.objects["a/b/c"] = b"z"
    for ask in (lambda: store.ranges.read(pin, 0, 1), lambda: store.checksum(pin)):
        with pytest.raises(ObjectChangedError):
            ask()
    del store.objects["a/b/c"]
    with pytest.raises(ObjectGoneError):
        store.ranges.read(pin, 0, 1)


def test_a_url_is_opened_by_the_store_of_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    url, options = SourceUrl.parse("s3://bucket/m"), MountOptions()
    given = StaticCredentials("id", "secret")
    assert stores.source_class(url) is S3Source

    class Opened:
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments

    monkeypatch.setitem(stores._STORES, "s3", lambda: Opened)  # type: ignore[arg-type]
    for more in ((), (given,)):
        opened = stores.open_source(url, options, *more)
        assert isinstance(opened, Opened)
        assert opened.arguments == (url, options, *(more or (None,)))
