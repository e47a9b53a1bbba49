"""The blocks that are in the kernel's page cache, for the next worker.

The page cache outlives a worker. Without a disk cache these blocks are nowhere else on this
machine, and a worker that did not know of them would fetch all of them again.

The map is a memory file, kept with the session (`lazyfs/handover/handover.py`). After a head it has
a record for each file with blocks in the page cache: inode number, number of blocks, and one byte
for each block. When a block enters or leaves the page cache, its byte is written in place with one
system call, which takes microseconds. So a worker can be killed at any moment, and no byte is ever
half written. An inode number follows from key, ETag and size, so a record never refers to another
version of an object.

The kernel may have dropped pages since then. That never gives a reader wrong bytes: it sends a read
request for pages that it does not find.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from lazyfs.blocks import BlockId, block_count
from lazyfs.blocks.file_blocks import Place
from lazyfs.listed_object import File
from lazyfs.namespace.tree import Tree

# Format of the records, and the block size in bytes.
_HEAD = struct.Struct("<8sQ")
_FORM = b"near 1\n\0"
# Inode number, number of blocks.
_RECORD = struct.Struct("<QQ")
# The size of one read: the unit of memory files, so that data after a hole is read from its start.
_PART_BYTES = 4096
_MARKS = {Place.NEAR: 1, Place.USED: 2}
_PLACES = {mark: place for place, mark in _MARKS.items()}


class PageMap:
    """The blocks of one mount that are in the page cache, or were read from it.

    Args:
        descriptor: the memory file. Content of another format or block size is discarded.
        block_size: the mount's, in bytes.
    """

    def __init__(self, descriptor: int, block_size: int) -> None:
        self.descriptor = descriptor
        self._block_size = block_size
        # Offset of the marks of each file.
        self._begins: dict[int, int] = {}
        head = _HEAD.pack(_FORM, block_size)
        if os.pread(descriptor, _HEAD.size, 0) != head:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, head, 0)
        self._end = _HEAD.size

    def read(self, tree: Tree) -> Iterator[tuple[File, BlockId, Place]]:
        """The blocks that former workers recorded, of files that are in the tree.

        A truncated record has no marks from there on.
        """
        size = os.fstat(self.descriptor).st_size
        while self._end + _RECORD.size <= size:
            inode, count = _RECORD.unpack(os.pread(self.descriptor, _RECORD.size, self._end))
            begin = self._end + _RECORD.size
            self._end = begin + count
            file = tree.get(inode)
            if (
                not isinstance(file, File)
                or block_count(file.size_bytes, self._block_size) != count
            ):
                continue
            self._begins[inode] = begin
            for number, mark in self._marks(begin, min(self._end, size)):
                yield file, BlockId(inode, number), _PLACES[mark]

    def _marks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Block and mark of each marked block; holes in the file, which have none, are skipped."""
        at = begin
        while at < end:
            try:
                at = os.lseek(self.descriptor, at, os.SEEK_DATA)
            except OSError:  # ENXIO: there are only holes
                return
            part = os.pread(self.descriptor, min(_PART_BYTES, end - at), at) if at < end else b""
            for offset, mark in enumerate(part):
                if mark in _PLACES:
                    yield at + offset - begin, mark
            at += max(1, len(part))

    def write(self, file: File, number: int, place: Place) -> None:
        """Record where a block is now. Call it when the block enters or leaves the page cache."""
        begin = self._begins.get(file.inode)
        if begin is None:
            count = block_count(file.size_bytes, self._block_size)
            os.pwrite(self.descriptor, _RECORD.pack(file.inode, count), self._end)
            begin = self._begins[file.inode] = self._end + _RECORD.size
            self._end = begin + count
        os.pwrite(self.descriptor, bytes((_MARKS.get(place, 0),)), begin + number)
