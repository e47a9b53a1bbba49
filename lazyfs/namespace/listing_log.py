"""What a mount has listed, written down as it happens, for the daemon that follows this one.

A mount is a snapshot: a name must mean the same object after a restart, whatever S3 lists by then.
So each listing is appended to a memory file before anybody sees its names. The memory file is kept
with the session; it is gone with the mount and leaves nothing on disk.

A record is its length in four bytes and then JSON, compressed. What was cut off in the middle of a
record was seen by nobody, and is passed over.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from operator import attrgetter

from lazyfs.memory_file import memory_file, read_whole
from lazyfs.objects import ListedObject

_LENGTH = struct.Struct("<I")
# As `dataclasses.astuple`, which takes ten times as long.
_fields_of = attrgetter(*(field.name for field in fields(ListedObject)))


@dataclass(frozen=True, slots=True)
class Listing:
    """What was listed of one directory.

    Attributes:
        prefix: of the directory.
        objects: what lies below it.
        prefixes: the common prefixes of a listing by `/`.
        whole: the objects are all that lies below, at any depth.
    """

    prefix: str
    objects: list[ListedObject]
    prefixes: list[str]
    whole: bool


class ListingLog:
    """The listings of one mount, in order.

    Args:
        descriptor: of a memory file with the listings so far; a new one when not given.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = memory_file("lazyfs-listing", b"") if descriptor is None else descriptor
        self._end = 0

    def read(self) -> Iterator[Listing]:
        """The listings that were written so far; what follows the last whole one is cut off."""
        content = read_whole(self.descriptor)
        while self._end + _LENGTH.size <= len(content):
            begin = self._end + _LENGTH.size
            stop = begin + _LENGTH.unpack_from(content, self._end)[0]
            if stop > len(content):
                break
            prefix, objects, prefixes, whole = json.loads(zlib.decompress(content[begin:stop]))
            yield Listing(prefix, [ListedObject(*each) for each in objects], prefixes, whole)
            self._end = stop
        os.ftruncate(self.descriptor, self._end)

    def append(self, listing: Listing) -> None:
        """Write a listing down."""
        objects = [_fields_of(each) for each in listing.objects]
        content = [listing.prefix, objects, listing.prefixes, listing.whole]
        record = zlib.compress(json.dumps(content).encode(), level=1)
        os.pwrite(self.descriptor, _LENGTH.pack(len(record)) + record, self._end)
        self._end += _LENGTH.size + len(record)
