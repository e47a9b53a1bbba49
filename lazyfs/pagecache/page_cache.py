"""The kernel's page cache as the tier nearest to the reader.

Blocks are put there before they are requested (FUSE_NOTIFY_STORE), so that a process that maps the
file finds its pages without any request. The pages are clean and charged to the worker's memory
cgroup: the kernel may drop them at any time, and then it sends a read request.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence

from lazyfs.machine import free_memory
from lazyfs.movers.call import MoverFaultError, MoverLostError
from lazyfs.movers.context import lent
from lazyfs.movers.pool import Movers

log = logging.getLogger(__name__)

# What movers know the device by.
DEVICE = "fuse"

# Larger stores are not faster, smaller ones are slower: 128 KiB pieces take three times as long.
PIECE = 1 << 20
# A model up to this share of the free memory may be in the page cache as a whole.
SHARE_FOR_ALL = 0.8
# For a larger model, the share of the kernel's list of inactive pages that unread pages may take.
SHARE_AHEAD = 0.5
BUDGET_AGE_S = 1.0

# linux/fuse.h: struct fuse_out_header with a notification's number in the place of an error, and
# struct fuse_notify_store_out.
_STORE = struct.Struct("<IiQQQII")
_NOTIFY_STORE = 4


class PageCache:
    """Puts blocks into the page cache, within a budget.

    Args:
        setting: `auto`, `off`, or bytes.

    Attributes:
        device: a descriptor of `/dev/fuse` that is never closed; None until libfuse has started.
            Until then nothing is pushed.
        movers: store blocks, where there are any; they are lent the device (`DEVICE`).
    """

    def __init__(self, setting: int | str) -> None:
        self.device: int | None = None
        self.movers: Movers | None = None
        self._setting = setting
        self._budget = 0
        self._read_at_s = -BUDGET_AGE_S
        self._lock = threading.Lock()
        self._pushing = 0
        self._stopped = False
        self.supported = setting != "off"
        self.pushed_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether a push is in progress."""
        return self._pushing > 0

    def stop(self) -> None:
        """Stop pushing; pushes in progress end soon, as long as reads are answered."""
        self._stopped = True

    def budget(self, planned_bytes: Callable[[], int], unused_bytes: int) -> int:
        """How many unread bytes may be in the page cache.

        If everything that a load reads fits, the kernel drops nothing, and all of it may be there.
        Otherwise the kernel must reclaim pages. Pages that a process mapped and read become active,
        and are spared; pushed pages are inactive until they are read, so they must be read before
        the kernel has gone through that list (`_inactive`).

        Args:
            planned_bytes: returns how many bytes readers read or will read.
            unused_bytes: memory that the worker may still use for itself.
        """
        if not self.supported or self.device is None:
            return 0
        if isinstance(self._setting, int):
            return self._setting
        now_s = time.monotonic()
        if now_s - self._read_at_s >= BUDGET_AGE_S:
            self._read_at_s = now_s
            free = max(0, free_memory() - unused_bytes)
            holds_all = planned_bytes() <= free * SHARE_FOR_ALL
            self._budget = int(free * SHARE_FOR_ALL if holds_all else _inactive(free) * SHARE_AHEAD)
        return self._budget

    def push(self, inode: int, offset: int, data: memoryview) -> bool:
        """Store a block; waits while one of its pages is locked by a read that waits for a reply.

        Called from other threads, never from the thread that replies.

        Returns:
            False if the kernel does not know the inode, or the mount has ended.
        """
        if not self._begins():
            return False
        try:
            self._store(inode, offset, data)
        except OSError as error:
            return self._failed(inode, error)
        finally:
            self._ends()
        self.pushed_bytes += len(data)
        return True

    async def push_elsewhere(
        self, inode: int, parts: Sequence[tuple[int, memoryview]]
    ) -> bool | None:
        """Like `push`, for a task of the trio thread: a mover stores parts of a file in one call.

        Args:
            parts: offset and bytes of each.

        None: they are to be stored here, because there is no mover, or it is not worth the call.
        """
        size = sum(len(data) for _, data in parts)
        if self.movers is None or size <= PIECE or not self._begins():
            return None
        try:
            await self.movers.run(
                store_pieces, inode, [offset for offset, _ in parts],
                buffer=[data for _, data in parts], ended=self._ends,
            )  # fmt: skip
        except (MoverLostError, MoverFaultError):
            return None
        except OSError as error:
            return self._failed(inode, error)
        self.pushed_bytes += size
        return True

    def _store(self, inode: int, offset: int, data: memoryview) -> None:
        """Raises OSError."""
        assert self.device is not None
        for start in range(0, len(data), PIECE):
            if self._stopped:
                raise InterruptedError(errno.EINTR, "the mount ends")
            store(self.device, inode, offset + start, data[start : start + PIECE])

    def _begins(self) -> bool:
        """Count a push; False if there must be none."""
        with self._lock:
            if self._stopped or self.device is None:
                return False
            self._pushing += 1
            return True

    def _ends(self) -> None:
        with self._lock:
            self._pushing -= 1

    def _failed(self, inode: int, error: OSError) -> bool:
        if error.errno == errno.ENOSYS:
            self.supported = False
            log.info("this kernel accepts no pages ahead of reads; mapped reads are slower")
        elif error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINTR, errno.EBADF):
            log.warning("pages of inode %d could not be put into the page cache: %s", inode, error)
        return False


def _inactive(memory_bytes: int) -> int:
    """The size below which the kernel does not shrink its list of inactive pages.

    It keeps one inactive page for isqrt(10 x GiB) active ones (Linux, mm/vmscan.c,
    inactive_is_low), for each cgroup and NUMA node. With generations in the place of lists
    (`lru_gen`) no such size is promised; it is used there, too.

    Args:
        memory_bytes: what both lists take.
    """
    return memory_bytes // (1 + (math.isqrt(10 * (memory_bytes >> 30)) or 1))


def store(device: int, inode: int, offset: int, piece: memoryview) -> None:
    """Have the kernel store a part of a file. Raises OSError."""
    os.writev(device, [_store_header(inode, offset, len(piece)), piece])


def store_pieces(inode: int, offsets: Sequence[int], *parts: memoryview) -> None:
    """Have the kernel store parts of a file, in a mover. Raises OSError."""
    device = lent(DEVICE)
    for offset, data in zip(offsets, parts, strict=True):
        for start in range(0, len(data), PIECE):
            store(device, inode, offset + start, data[start : start + PIECE])


def _store_header(inode: int, offset: int, size: int) -> bytes:
    """The header before `size` bytes that the kernel is to store."""
    return _STORE.pack(_STORE.size + size, _NOTIFY_STORE, 0, inode, offset, size, 0)
