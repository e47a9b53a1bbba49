"""Which blocks lie in the kernel's page cache, for the worker that follows this one.

What was put there outlives a worker, and without a disk cache it is nowhere else on this machine: a
worker that did not know of it would fetch all of it again.

It is a memory file, kept with the session (`lazyfs/handover/handover.py`). After a head there is a
record for each file of which a block came into the page cache: its inode number, how many blocks it
has, and a byte for each of them. When a block comes or goes its byte is written, in place and by a
system call of its own, which takes microseconds. So a worker can be killed at any moment:
what it knew is there, and no byte can be half written. An inode number follows from key, ETag and
size, so a record never speaks of other bytes than those that its file has.

The kernel may have dropped pages since. Nothing here makes a reader get wrong bytes: for what he
does not find he asks.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from lazyfs.blocks import BlockId, block_count
from lazyfs.blocks.file_blocks import Place
from lazyfs.memory_file import read_whole
from lazyfs.namespace.tree import Tree
from lazyfs.objects import File

# What the records are like, and the size of blocks in bytes.
_HEAD = struct.Struct("<8sQ")
_FORM = b"near 1\n\0"
# Inode number, and how many blocks there are.
_RECORD = struct.Struct("<QQ")
_MARKS = {Place.NEAR: 1, Place.USED: 2}
_PLACES = {mark: place for place, mark in _MARKS.items()}


class PageMap:
    """The blocks of one mount that are in the page cache, or were read out of it.

    Args:
        descriptor: of the memory file. What is not of this form and block size is forgotten.
        block_size: of the mount, in bytes.
    """

    def __init__(self, descriptor: int, block_size: int) -> None:
        self.descriptor = descriptor
        self._block_size = block_size
        # Where the marks of each file begin.
        self._begins: dict[int, int] = {}
        head = _HEAD.pack(_FORM, block_size)
        if os.pread(descriptor, _HEAD.size, 0) != head:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, head, 0)
        self._end = _HEAD.size

    def read(self, tree: Tree) -> Iterator[tuple[File, BlockId, Place]]:
        """What a former worker has left, of files that are in the tree.

        A record that was cut off has no marks from there on.
        """
        content = read_whole(self.descriptor)
        while self._end + _RECORD.size <= len(content):
            inode, count = _RECORD.unpack_from(content, self._end)
            begin = self._end + _RECORD.size
            self._end = begin + count
            file = tree.get(inode)
            if (
                not isinstance(file, File)
                or block_count(file.size_bytes, self._block_size) != count
            ):
                continue
            self._begins[inode] = begin
            for number, mark in enumerate(content[begin : self._end]):
                if mark in _PLACES:
                    yield file, BlockId(inode, number), _PLACES[mark]

    def write(self, file: File, number: int, place: Place) -> None:
        """A block is now there. To be called when that is the page cache, or was."""
        begin = self._begins.get(file.inode)
        if begin is None:
            count = block_count(file.size_bytes, self._block_size)
            os.pwrite(self.descriptor, _RECORD.pack(file.inode, count), self._end)
            begin = self._begins[file.inode] = self._end + _RECORD.size
            self._end = begin + count
        os.pwrite(self.descriptor, bytes((_MARKS.get(place, 0),)), begin + number)
