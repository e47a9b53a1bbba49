"""What others wrote takes no more memory than it may: names, indexes, headers, marks of pages."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore

from lazyfs.blocks.file_blocks import Place
from lazyfs.errors import TooManyNamesError
from lazyfs.listed_object import ListedObject
from lazyfs.memory_file import memory_file
from lazyfs.model.indexes import MalformedIndexError, parse_index
from lazyfs.model.json_cost import json_cost
from lazyfs.namespace import catalog as catalogs
from lazyfs.namespace.catalog import NAMES_BYTES, NAMES_SHARE, Catalog
from lazyfs.namespace.listing_log import ListingLog
from lazyfs.namespace.tree import Directory, Tree
from lazyfs.observe.recorder import Recorder
from lazyfs.options.mount_options import MountOptions
from lazyfs.pagecache.page_map import PageMap


def taken(action: object) -> int:
    """The most memory that a call takes, in bytes."""
    tracemalloc.start()
    try:
        assert callable(action)
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


VALUES = st.recursive(
    st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=30), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=10), inner)),
)


@given(VALUES)
def test_parsing_takes_no_more_than_was_thought(value: object) -> None:
    text = json.dumps([value] * 50, ensure_ascii=False).encode()
    assert taken(lambda: json.loads(text.decode())) <= json_cost(text) + 20_000


@pytest.mark.parametrize(
    "element", ["[]", "{}", '{"a":0}', '"Āā"', "1.5", "[1000000]", '"\U0001f600"']
)
def test_json_cost_covers_expensive_texts(element: str) -> None:
    text = ("[" + ",".join([element] * 50_000) + "]").encode()
    assert taken(lambda: json.loads(text.decode())) <= json_cost(text)


def test_an_index_that_takes_too_much_memory_is_ignored() -> None:
    index = b'{"weight_map": {"a": "1.safetensors"}, "x": [' + b"[]," * 1_000_000 + b"0]}"
    with pytest.raises(MalformedIndexError, match="memory"):
        parse_index(index)


def keys(count: int, depth: int) -> Iterator[ListedObject]:
    """Keys of the greatest length, none of which shares a directory with another."""
    for number in range(count):
        key = f"{number:06}/" + "a/" * depth
        key += "x" * (1024 - len(key))
        yield ListedObject(key, 1, '"e"', 1, key)


@pytest.mark.parametrize("depth", [1, 50, 400])
def test_names_take_no_more_than_was_thought(depth: int) -> None:
    objects = [each for each in keys(100, depth) if len(each.key.rpartition("/")[2]) < 256]
    if not objects:
        objects = [
            ListedObject(each.key[:-800], 1, '"e"', 1, each.key) for each in keys(100, depth)
        ]
    tree = Tree("")
    cost = tree.cost_bytes(tree.root, objects)
    took = taken(lambda: tree.plant(tree.root, objects, whole=True))
    assert tree.file_count == 100
    assert took <= cost + 50_000 <= 3 * took + 200_000


def test_more_names_than_fit_are_refused() -> None:
    """A page of a few hundred kilobytes, whose directories would take hundreds of megabytes."""
    options = MountOptions(memory_limit=64 << 20)
    limit = NAMES_BYTES + NAMES_SHARE * options.memory_limit
    store = MemoryStore({f"{number:04}/" + "a/" * 490 + "x": b"1" for number in range(900)})
    catalog = Catalog(store, options, ListingLog(None), Recorder("off"))

    def mount() -> None:
        with pytest.raises(TooManyNamesError, match="memory-limit"):
            trio.run(catalog.open)

    assert taken(mount) < limit
    assert catalog.tree.file_count == 0


def test_names_of_former_workers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each restart of a worker would let as many more in."""
    store = MemoryStore({f"{place}/{number}": b"1" for place in "ab" for number in range(600)})
    options = MountOptions(memory_limit=64 << 20)
    monkeypatch.setattr(catalogs, "NAMES_SHARE", 0)
    monkeypatch.setattr(catalogs, "NAMES_BYTES", 400_000)  # of one directory, not of both

    def list_directory(mounted: Catalog, name: str) -> None:
        directory = trio.run(mounted.children, mounted.tree.root)[name]
        assert isinstance(directory, Directory)
        trio.run(mounted.children, directory)

    journal = ListingLog(None)
    first = Catalog(store, options, journal, Recorder("off"))
    trio.run(first.open)
    list_directory(first, "a")
    next_one = Catalog(store, options, ListingLog(journal.descriptor), Recorder("off"))
    next_one.restore()
    for mounted in (first, next_one):
        with pytest.raises(TooManyNamesError):
            list_directory(mounted, "b")
    os.close(journal.descriptor)


def test_marks_of_huge_files_are_read_without_their_holes() -> None:
    """A thousand times 50 TB: the map of their pages would be 50 GB if it was not sparse."""
    size, block = 50 << 40, 1 << 20
    tree = Tree("")
    objects = [ListedObject(f"{n:04}", size, '"e"', 1, f"{n:04}") for n in range(1000)]
    tree.plant(tree.root, objects, whole=True)
    descriptor = memory_file("test", b"")
    written = PageMap(descriptor, block)
    files = list(tree.files())
    marked = [(file, number) for file in files for number in (0, 1, 4096, size // block - 1)]
    for file, number in marked:
        written.write(file, number, Place.NEAR)
    found = []

    def read() -> None:
        found.extend(PageMap(descriptor, block).read(tree))

    assert taken(read) < 10 << 20
    assert [(file, at.number) for file, at, _ in found] == marked
    assert {place for _, _, place in found} == {Place.NEAR}
    os.close(descriptor)
