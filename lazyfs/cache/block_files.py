"""The block files of a cache directory.

They lie in folders of two hexadecimal digits, under random names. A name comes from the index,
which other programs may have changed, so only names of this form become paths.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lazyfs.blocks.buffers import ALIGNMENT
from lazyfs.cache.block_format import Content, DamagedBlockError, parse_tail
from lazyfs.cache.block_io import NewFile, read_block, read_pieces, write_blocks
from lazyfs.cache.direct_io import make_folder
from lazyfs.cache.index import FOLDERS, IndexCorruptError
from lazyfs.movers.pool import Movers

_FOLDER = re.compile("[0-9a-f]{2}")
_FILENAME = re.compile("[0-9a-f]{2}/[0-9a-f]{30}")


class Described(NamedTuple):
    """The description at the end of a block file; `modified_s`: when it was written (epoch)."""

    content: Content
    number: int
    modified_s: float


class BlockFiles:
    """The block files of one directory.

    Args:
        path: the directory's.

    Attributes:
        movers: read and write the files; None: the calling thread does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.movers: Movers | None = None

    def make_folders(self) -> None:
        """Make the folders that are missing. Raises OSError."""
        for folder in FOLDERS:
            make_folder(Path(self._path, folder))

    def path(self, filename: str) -> Path:
        """The path of a block file. Raises IndexCorruptError if no block file has such a name."""
        if not _FILENAME.fullmatch(filename):
            raise IndexCorruptError(f"its index names invalid files: {filename!r}")
        return self._path / filename

    def names(self) -> list[str]:
        """All block files; other files are not touched. Raises OSError."""
        folders = (path for path in self._path.iterdir() if _FOLDER.fullmatch(path.name))
        names = (f"{folder.name}/{path.name}" for folder in folders for path in folder.iterdir())
        return [name for name in names if _FILENAME.fullmatch(name)]

    def read(self, filename: str, content: Content, number: int) -> memoryview:
        """The checked bytes of a block.

        Raises:
            DamagedBlockError: the file has other bytes.
            OSError: it cannot be read.
        """
        return read_block(self.path(filename), content, number, self.movers)

    def read_part(
        self, filename: str, length: int, sums: bytes, start: int, stop: int
    ) -> memoryview:
        """The checked bytes `start` to `stop` of a block. See `read_pieces`."""
        return read_pieces(self.path(filename), length, sums, start, stop)

    def write_all(
        self, blocks: Sequence[tuple[str, Content, int, memoryview]]
    ) -> tuple[list[bytes], OSError | None]:
        """Write new files: name, content, number and bytes of each. See `write_blocks`."""
        files = [
            NewFile(self.path(filename), content, number, data)
            for filename, content, number, data in blocks
        ]
        return write_blocks(files, self.movers)

    def describe(self, filename: str) -> Described | None:
        """The description in a block file, without checking the block; None if it is damaged."""
        try:
            with open(self.path(filename), "rb") as file:
                status = os.fstat(file.fileno())
                file.seek(max(0, status.st_size - 2 * ALIGNMENT))
                content, number, _ = parse_tail(file.read())
        except (OSError, DamagedBlockError):
            return None
        if status.st_size != content.file_length(number):
            return None
        return Described(content, number, status.st_mtime)

    def remove(self, filenames: Iterable[str]) -> None:
        """Delete files, as far as they are there. Raises OSError."""
        for filename in filenames:
            with contextlib.suppress(FileNotFoundError):
                self.path(filename).unlink()


def new_name() -> str:
    """A name that no block file has."""
    name = os.urandom(16).hex()
    return f"{name[0]}0/{name[2:]}"
