"""What every room knows of an object: as a listing has it, and as the file that it is shown as."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One object of a listing. `key` is None when it is not UTF-8; `shown` is for messages."""

    key: str | None
    size_bytes: int
    etag: str
    modified_ns: int
    shown: str


@dataclass(frozen=True, slots=True)
class File:
    """A file: one object, pinned by its ETag."""

    inode: int
    parent: int
    name: str
    key: str
    size_bytes: int
    etag: str
    modified_ns: int
