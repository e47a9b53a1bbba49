"""Tells a load of a file from a look at its header, and knows the file that a load begins with.

A program that lists the models of a folder reads the beginning of each file, which may have
gigabytes: a look is no load. But most programs open only what they load. So the first file is
followed as if it were loaded, and so is each later one, unless one was only looked at before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lazyfs.blocks.file_blocks import FileBlocks, Place

# A program that looks at a file without loading it reads at most this much of its beginning (the
# vocabulary of a GGUF model takes 15 MB) and of its end (the directory of a ZIP file), and at most
# a quarter of the file. Applies to files whose header is not known.
LOOK_BYTES = 15 << 20
LOOK_AT_END_BYTES = 1 << 20


class Loads:
    """The files that were read beyond their header, in this order.

    Args:
        files: all files by inode; files may be added later.
        read_ahead_bytes: how far beyond a read the kernel's own read-ahead may begin.
    """

    def __init__(self, files: Mapping[int, FileBlocks], read_ahead_bytes: int) -> None:
        self._files = files
        self._read_ahead_bytes = read_ahead_bytes
        self._loaded: dict[int, None] = {}
        # Large files without a place in the order of which only the header was read so far.
        self._looked_at: set[int] = set()
        # Where the first request beyond the header of a file was.
        self._beyond_header: dict[int, int] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._loaded)

    def __contains__(self, inode: int) -> bool:
        return inode in self._loaded

    def is_look(self, inode: int) -> bool:
        """Whether the reads of a file so far are probably a look at its header."""
        return inode not in self._loaded and not self._looked_at <= {inode}

    def read(self, inode: int, offset: int, middle: int) -> bool:
        """A file was read from an offset on, and wanted what is in the middle.

        A single request close to the header may be the kernel's read-ahead after a look at it
        (Linux, mm/readahead.c, page_cache_async_ra).

        Returns:
            Whether this shows that the file is loaded, for the first time.
        """
        if inode in self._loaded:
            return False
        blocks = self._files[inode]
        if not _is_load(blocks, middle):
            if blocks.size_bytes > LOOK_BYTES:
                self._looked_at.add(inode)
            return False
        is_near = offset < _header_end(blocks) + self._read_ahead_bytes
        is_first = self._beyond_header.setdefault(inode, offset) == offset
        if blocks.rank < 0 and is_near and is_first:
            return False
        self._looked_at.discard(inode)
        self._loaded[inode] = None
        return True

    @property
    def first(self) -> int | None:
        """The file that the load began with, while it is still coming and the only one loaded."""
        if len(self._loaded) != 1:
            return None
        (inode,) = self._loaded
        return inode if self._files[inode].counts[Place.COMING] else None


def _is_load(blocks: FileBlocks, offset: int) -> bool:
    """Whether a read at this offset, beyond a known header, shows that the file is being loaded."""
    if blocks.roles or blocks.rank >= 0:
        return True
    end = blocks.size_bytes - min(LOOK_AT_END_BYTES, blocks.size_bytes // 4)
    return _header_end(blocks) <= offset < end


def _header_end(blocks: FileBlocks) -> int:
    """Where the header of a file ends, or at the latest."""
    return blocks.header_bytes or min(LOOK_BYTES, blocks.size_bytes // 4)
