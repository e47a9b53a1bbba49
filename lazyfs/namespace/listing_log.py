"""The listings of a mount, recorded for the next worker.

A mount is a snapshot: a name must mean the same object after a restart, whatever S3 lists then. So
each listing is appended to a memory file before its names are shown. The memory file is kept with
the session; it is gone with the mount and leaves nothing on disk.

A record is its length in four bytes, followed by compressed JSON. The length is written last. A
truncated last record, or one without a length, was never shown, and is ignored.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter

from lazyfs.listed_object import ListedObject
from lazyfs.memory_file import memory_file, read_whole
from lazyfs.steps import at_once

_LENGTH = struct.Struct("<I")
# Objects or prefixes that are written in one step: about 1 ms.
STEP = 250
# Like `dataclasses.astuple`, but ten times as fast.
_fields_of = attrgetter(*(field.name for field in fields(ListedObject)))


@dataclass(frozen=True, slots=True)
class Listing:
    """The listing of one directory.

    Attributes:
        prefix: the prefix of the directory.
        objects: the objects below it.
        prefixes: the common prefixes of a listing by `/`.
        whole: the objects are all below it, at any depth.
    """

    prefix: str
    objects: list[ListedObject]
    prefixes: list[str]
    whole: bool


class ListingLog:
    """The listings of one mount, in order.

    Args:
        descriptor: a memory file with the listings so far; a new one by default.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = memory_file("lazyfs-listing", b"") if descriptor is None else descriptor
        self._end = 0

    def read(self) -> Iterator[Listing]:
        """The listings written so far; a truncated record at the end is removed."""
        content = read_whole(self.descriptor)
        while self._end + _LENGTH.size <= len(content):
            begin = self._end + _LENGTH.size
            stop = begin + _LENGTH.unpack_from(content, self._end)[0]
            if stop > len(content) or stop == begin:
                break
            prefix, objects, prefixes, whole = json.loads(zlib.decompress(content[begin:stop]))
            yield Listing(prefix, [ListedObject(*each) for each in objects], prefixes, whole)
            self._end = stop
        os.ftruncate(self.descriptor, self._end)

    def append(self, listing: Listing) -> None:
        """Append a listing."""
        at_once(self.writing(listing))()

    def writing(self, listing: Listing) -> Generator[None, None, Callable[[], None]]:
        """Write a listing in short steps, between which nothing else may be written.

        Returns:
            What makes it count.
        """
        os.ftruncate(self.descriptor, self._end)
        end = self._end + _LENGTH.size
        packer = zlib.compressobj(level=1)

        def write(text: str) -> None:
            nonlocal end
            end += os.pwrite(self.descriptor, packer.compress(text.encode()), end)

        write(f"[{json.dumps(listing.prefix)}, [")
        for first in range(0, len(listing.objects), STEP):
            objects = [_fields_of(each) for each in listing.objects[first : first + STEP]]
            write((", " if first else "") + json.dumps(objects)[1:-1])
            yield
        write("], [")
        for first in range(0, len(listing.prefixes), STEP):
            prefixes = listing.prefixes[first : first + STEP]
            write((", " if first else "") + json.dumps(prefixes)[1:-1])
            yield
        write(f"], {json.dumps(listing.whole)}]")
        end += os.pwrite(self.descriptor, packer.flush(), end)
        begin = self._end

        def count() -> None:
            os.pwrite(self.descriptor, _LENGTH.pack(end - begin - _LENGTH.size), begin)
            self._end = end

        return count
