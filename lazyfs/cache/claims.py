"""Who fetches a block: one process, while the others wait for it to appear on disk.

A claim is a lock on one byte of a file, at a place that follows from the block's key (open file
description locks, fcntl(2)). It costs a system call, is never written to a disk, and ends with its
process, however that ends. What a claim cannot know is whether its holder gets anywhere: who
waits does so for a limited time, the lease, and then fetches for himself.

Those who wait hold a shared lock on a byte of another file, so that a holder who could put off
writing to the disk sees that somebody wants it soon. Those who load a content hold one on a byte of
a third, so that nobody takes away what one of them has read and another has not.
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

# struct flock of 64-bit Linux: l_type, l_whence, padding, l_start, l_len, l_pid.
_FLOCK = struct.Struct("=hh4xqqi4x")
# Whether others wait is asked several times a block, and must not cost a system call each time.
LOOK_S = 0.02
NAMES = ("claims", "waiting", "loading")


class Claims:
    """The claims of one directory, as one process has them.

    Args:
        directory: of the three files, which are made.

    Raises:
        OSError: they cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        # File objects: closed when the last thread has let go of them, never under a call.
        self._claims, self._waiting, self._loading = (
            FileIO(os.open(directory / name, flags, 0o600), "r+") for name in NAMES
        )
        self._looked_at_s = -LOOK_S
        self._others_wait = False

    def claim(self, key: str) -> bool:
        """Take a block, unless another process has it."""
        return self._lock(self._claims, fcntl.F_WRLCK, _place(key))

    def release(self, key: str) -> None:
        """Give a block back; without effect on what is not ours."""
        self._lock(self._claims, fcntl.F_UNLCK, _place(key))

    def is_taken(self, key: str) -> bool:
        """Whether another process has a block now."""
        return self._is_locked(self._claims, _place(key), 1)

    def set_waiting(self, key: str, waiting: bool) -> None:
        """Let the others see whether this process waits for a block."""
        self._lock(self._waiting, fcntl.F_RDLCK if waiting else fcntl.F_UNLCK, _place(key))

    def others_wait(self) -> bool:
        """Whether another process waits for a block, of whoever has it, or did a moment ago."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s >= LOOK_S:
            self._looked_at_s = now_s
            self._others_wait = self._is_locked(self._waiting, 0, 0)
        return self._others_wait

    def set_loading(self, content: str) -> None:
        """Let the others see, from now on, that this process loads a content."""
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
            # A filesystem without locks (ENOLCK, EINVAL): every process fetches for itself.
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
