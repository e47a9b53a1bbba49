"""Claims: one process fetches a block, and the others wait for it to appear on disk.

A claim is a lock on one byte of a file, at an offset that follows from the block's key (open file
description locks, fcntl(2)). It costs a system call, is never written to a disk, and ends with its
process, however that ends. A claim cannot show whether its holder makes progress: others wait for a
limited time, the lease, and then fetch the block themselves.

Waiting processes hold a shared lock on a byte of a second file, so that a holder sees that others
need the block on disk soon. Processes that load a content hold one on a byte of a third file, so
that blocks which one of them has read stay for the others. From its first claim to a block of a
content on, a process holds a shared lock for the content, on another byte of the third file:
without another process's one, it is *alone*, and no block of the content appears on disk but its
own. The kernel goes through all locks of a file at each call, so none stays in that of the claims.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import time
from io import FileIO
from pathlib import Path

from lazyfs.cache.direct_io import open_own

# struct flock of 64-bit Linux: l_type, l_whence, padding, l_start, l_len, l_pid.
_FLOCK = struct.Struct("=hh4xqqi4x")
# Whether others wait is asked several times a block, and must not cost a system call each time.
LOOK_S = 0.02
NAMES = ("claims", "waiting", "loading")


class Claims:
    """One process's claims in one directory.

    Args:
        directory: that of the three files, which are created.

    Raises:
        OSError: they cannot be created.
    """

    def __init__(self, directory: Path) -> None:
        # File objects: closed when the last thread has released them, never during a call.
        self._claims, self._waiting, self._loading = (
            FileIO(open_own(directory / name), "r+") for name in NAMES
        )
        self._brought: set[str] = set()
        self._looked_at_s = -LOOK_S
        self._others_wait = False

    def bring(self, content: str) -> None:
        """Show other processes from now on that this one may store blocks of a content."""
        if content not in self._brought:
            self._lock(self._loading, fcntl.F_RDLCK, _place(f"{content} is brought"))
            self._brought.add(content)

    def is_alone(self, content: str) -> bool:
        """Whether no other process that runs now may store blocks of a content."""
        return not self._is_locked(self._loading, _place(f"{content} is brought"), 1)

    def claim(self, key: str) -> bool:
        """Claim a block, unless another process has it."""
        return self._lock(self._claims, fcntl.F_WRLCK, _place(key))

    def release(self, key: str) -> None:
        """Release a claim; no effect on other processes' claims."""
        self._lock(self._claims, fcntl.F_UNLCK, _place(key))

    def is_taken(self, key: str) -> bool:
        """Whether another process has claimed a block."""
        return self._is_locked(self._claims, _place(key), 1)

    def set_waiting(self, key: str, waiting: bool) -> None:
        """Show other processes whether this one waits for a block."""
        self._lock(self._waiting, fcntl.F_RDLCK if waiting else fcntl.F_UNLCK, _place(key))

    def others_wait(self) -> bool:
        """Whether another process waits for any claimed block, or did a moment ago."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s >= LOOK_S:
            self._looked_at_s = now_s
            self._others_wait = self._is_locked(self._waiting, 0, 0)
        return self._others_wait

    def set_loading(self, content: str) -> None:
        """Show other processes from now on that this one loads a content."""
        self._lock(self._loading, fcntl.F_RDLCK, _place(content))

    def others_load(self, content: str) -> bool:
        """Whether another process loads a content."""
        return self._is_locked(self._loading, _place(content), 1)

    def _lock(self, file: FileIO, kind: int, place: int) -> bool:
        request = _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)
        except BlockingIOError:
            return False
        except OSError:
            # A filesystem without locks (ENOLCK, EINVAL): each process fetches its own blocks.
            return True
        return True

    def _is_locked(self, file: FileIO, place: int, length: int) -> bool:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, length, 0)
        with contextlib.suppress(OSError):
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, request)
            return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
        return False


def _place(key: str) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
