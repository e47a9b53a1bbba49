"""An S3 object as it is in a listing, and as a file of the mount."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One object of a listing.

    Attributes:
        etag: names its version; empty if the store names none, and then size and time pin it.
        modified_ns: since the epoch; 0: not known.
        shown: the key, for messages.
    """

    key: str
    size_bytes: int
    etag: str
    modified_ns: int
    shown: str


@dataclass(frozen=True, slots=True)
class File:
    """A file of the mount: one object, pinned by its ETag."""

    inode: int
    parent: int
    name: str
    key: str
    size_bytes: int
    etag: str
    modified_ns: int
