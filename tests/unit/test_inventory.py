"""What a cache is said to have."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from lazyfs.cache.block_format import Content
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.index import Stored
from lazyfs.cache.inventory import Entry, models, objects

# Ten blocks, of which the last has 5 bytes.
CONTENT = Content("http://s3", "b", "m/w", '"1"', 905, 100)


class Directory:
    def __init__(self, *stored: Stored) -> None:
        self._stored = list(stored)

    def stored(self) -> list[Stored]:
        return self._stored


def stored(
    blocks: int, last: int, times: tuple[float, float], content: Content = CONTENT
) -> Stored:
    return Stored(content.identity.decode(), blocks, last, *times)


def listed(*directories: Directory) -> list[Entry]:
    return objects(cast(CacheDirectory, directory) for directory in directories)


def test_the_blocks_of_an_object_are_counted_over_all_directories() -> None:
    (entry,) = listed(
        Directory(stored(2, 8, (20.0, 30.0))), Directory(), Directory(stored(3, 7, (10.0, 25.0)))
    )
    assert entry == Entry("s3://b/m/w", "http://s3", 1, 905, 500, 10.0, 30.0)


def test_the_last_block_is_shorter() -> None:
    (entry,) = listed(Directory(stored(2, 9, (1.0, 2.0))), Directory(stored(8, 7, (1.0, 2.0))))
    assert entry.cached_bytes == entry.size_bytes == 905


def test_objects_are_listed_by_name_and_models_by_directory() -> None:
    keys = ("z/w", "m/w", "m/a", "top")
    contents = [replace(CONTENT, key=key) for key in keys] + [
        replace(CONTENT, key="m/w", etag='"2"', size_bytes=100),
        replace(CONTENT, key="m/w", endpoint="http://other"),
    ]
    entries = listed(
        Directory(*(stored(1, 0, (10.0 + at, 20.0 + at), each) for at, each in enumerate(contents)))
    )
    names = [entry.name for entry in entries]
    assert names == ["s3://b/m/a", *["s3://b/m/w"] * 3, "s3://b/top", "s3://b/z/w"]
    assert models(entries) == [
        Entry("s3://b/", "http://s3", 1, 905, 100, 13.0, 23.0),
        Entry("s3://b/m/", "http://other", 1, 905, 100, 15.0, 25.0),
        Entry("s3://b/m/", "http://s3", 3, 1910, 300, 11.0, 24.0),
        Entry("s3://b/z/", "http://s3", 1, 905, 100, 10.0, 20.0),
    ]


def test_an_empty_cache_has_nothing() -> None:
    assert listed() == listed(Directory()) == models([]) == []
