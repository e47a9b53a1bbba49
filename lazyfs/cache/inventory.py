"""Lists the content of a cache: which objects, how much of each, since when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lazyfs.cache.block_format import Content
from lazyfs.cache.directory import CacheDirectory
from lazyfs.store.url import object_name


@dataclass(frozen=True, slots=True)
class Entry:
    """The cached part of an object, or of the objects of one S3 directory. Times are seconds since
    the epoch.

    Attributes:
        name: `s3://bucket/key`, or the same of the directory, which ends in a slash.
        endpoint: the service that has it.
        files: the number of objects with cached blocks.
        size_bytes: the size of these objects.
        cached_bytes: how much of them is cached.
        stored_s: when the first block was stored.
        used_s: when a block was last used, or announced as needed.
    """

    name: str
    endpoint: str
    files: int
    size_bytes: int
    cached_bytes: int
    stored_s: float
    used_s: float


def objects(directories: Iterable[CacheDirectory]) -> list[Entry]:
    """All objects with cached blocks, by name; each version of an object is an entry."""
    by_content = defaultdict(list)
    for directory in directories:
        for stored in directory.stored():
            by_content[stored.tag].append(stored)
    entries = []
    for tag, parts in by_content.items():
        content = Content.from_identity(tag.encode())
        cached = sum(part.blocks for part in parts) * content.block_size
        last = content.block_count - 1
        if any(part.last_number == last for part in parts):
            cached -= content.block_size - content.length(last)
        entries.append(
            Entry(
                name=object_name(content.bucket, content.key),
                endpoint=content.endpoint,
                files=1,
                size_bytes=content.size_bytes,
                cached_bytes=cached,
                stored_s=min(part.stored_s for part in parts),
                used_s=max(part.used_s for part in parts),
            )
        )
    return sorted(entries, key=lambda entry: entry.name)


def models(entries: Iterable[Entry]) -> list[Entry]:
    """The same by S3 directory."""
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.name[: entry.name.rindex("/") + 1], entry.endpoint].append(entry)
    return [
        Entry(
            name=name,
            endpoint=endpoint,
            files=len(group),
            size_bytes=sum(entry.size_bytes for entry in group),
            cached_bytes=sum(entry.cached_bytes for entry in group),
            stored_s=min(entry.stored_s for entry in group),
            used_s=max(entry.used_s for entry in group),
        )
        for (name, endpoint), group in sorted(groups.items())
    ]
