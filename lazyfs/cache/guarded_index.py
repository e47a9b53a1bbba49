"""The index of a cache directory, guarded against damage, loss and failing disks.

Other processes and programs may replace or delete the index or the whole directory at any time, and
the disk may fail. So each operation on the index is an *attempt*: it opens the index if there is
none or another one; a damaged index is deleted, and its rows are made again from the block files; a
failing disk is left alone for a while (it *rests*), and the mount continues without it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TypeVar

from lazyfs import cache_place
from lazyfs.cache.block_files import BlockFiles
from lazyfs.cache.claims import Claims
from lazyfs.cache.direct_io import open_own
from lazyfs.cache.index import (
    INDEX_NAME,
    BlockIndex,
    IndexCorruptError,
    IndexFailedError,
    remove_index,
)
from lazyfs.errors import CacheError

log = logging.getLogger(__name__)

# How long a full or failing disk is left alone before it is tried again.
REST_S = 30.0
_OPENING = "opening"
T = TypeVar("T")


class Side(Enum):
    """The sides of a directory, which fail separately: a full disk can be read."""

    READING = "read"
    WRITING = "written"


class GuardedIndex:
    """The index of one directory.

    Args:
        path: the directory's; it is created if it is missing.
        files: those of the directory.

    Attributes:
        claims: of the directory; None until it was opened.
        is_anew: the index was made anew, and has no rows for files that are there.
    """

    def __init__(self, path: Path, files: BlockFiles) -> None:
        self._path = path
        self._files = files
        self._opening = threading.Lock()
        self._index: BlockIndex | None = None
        self._rests_until: dict[Side, float] = {}
        self.claims: Claims | None = None
        self.is_anew = False

    def open(self) -> None:
        """Open or create the directory and its index.

        Raises:
            CacheError: the directory cannot be made, written, or trusted.
            OSError: nothing can be made in it.
            IndexFailedError: the index does not work.
        """
        try:
            self._current()
        except IndexCorruptError as error:
            self._replace(error)
            self._current()

    def attempt(self, side: Side, action: Callable[[BlockIndex], T], otherwise: T) -> T:
        """Run an operation on the directory; errors are logged, and then the directory rests."""
        if self.is_resting(side):
            return otherwise
        try:
            try:
                result = action(self._current())
            except IndexCorruptError as error:
                self._replace(error)
                result = otherwise
        except (OSError, IndexFailedError, CacheError) as error:
            self._rest(side, error)
            return otherwise
        if self._rests_until.pop(side, None):
            log.info("cache directory %s can be %s again", self._path, side.value)
        return result

    def is_resting(self, side: Side) -> bool:
        """Whether the directory is left alone now."""
        return time.monotonic() < self._rests_until.get(side, 0.0)

    def _rest(self, side: Side, error: Exception) -> None:
        if side not in self._rests_until:
            log.warning(
                "cache directory %s cannot be %s: %s; continuing without it, and trying again "
                "every %.0f s", self._path, side.value, error, REST_S,
            )  # fmt: skip
        self._rests_until[side] = time.monotonic() + REST_S

    def _current(self) -> BlockIndex:
        """The present index of the directory; the index or the directory may have been replaced."""
        index = self._index
        if index is None or not index.is_current:
            with self._opening:
                if self._index is None or not self._index.is_current:
                    self._index = self._open()
                index = self._index
        return index

    def _open(self) -> BlockIndex:
        # SQLite maps a file. A thread that waits for a page of it, as the disk hangs, holds the
        # lock of the process's memory, and with that every other thread (mmap_lock of the kernel).
        cache_place.read_disk(self._path)
        cache_place.check(self._path)
        self._files.make_folders()
        self.claims = Claims(self._path)
        file = Path(self._path, INDEX_NAME)
        with locked(self._path / _OPENING, wait=True):
            if not file.exists() or not file.stat().st_size:
                remove_index(self._path)
                self.is_anew = True
            # SQLite gives its other files the mode of this one.
            os.close(open_own(file))
            return BlockIndex(self._path)

    def _replace(self, error: IndexCorruptError) -> None:
        """Delete a damaged index, unless another process has done so."""
        with self._opening, locked(self._path / _OPENING, wait=True):
            if self._index is None or self._index.is_current:
                log.warning(
                    "cache directory %s: %s; rebuilding it from the files", self._path, error
                )
                remove_index(self._path)
                self.is_anew = True
            self._index = None


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[int | None]:
    """A file that is locked among all processes; None if another one has it and `wait` is false.

    Raises:
        OSError: the file cannot be made or locked.
    """
    descriptor: int | None
    with open(open_own(path), "rb") as file:
        descriptor = file.fileno()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            descriptor = None
        yield descriptor
