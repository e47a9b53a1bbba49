"""How much a cache directory may hold. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one directory.

    Attributes:
        size: most bytes of blocks, or a share (float) of what is free or already the cache's.
        reserve: free bytes of the filesystem that are left to others, or a share of the whole.
    """

    size: int | float
    reserve: int | float = 0

    def allowed_bytes(self, disk: os.statvfs_result, used_bytes: int) -> int:
        """Most bytes that the cache may hold now.

        Args:
            disk: the filesystem as it is.
            used_bytes: what the cache holds of it.
        """
        free = disk.f_bavail * disk.f_frsize
        size = _part(self.size, free + used_bytes)
        return max(0, min(size, used_bytes + free - self.reserve_bytes(disk)))

    def reserve_bytes(self, disk: os.statvfs_result) -> int:
        """The free space that is left to others."""
        return _part(self.reserve, disk.f_blocks * disk.f_frsize)


def _part(size: int | float, whole: int) -> int:
    return size if isinstance(size, int) else int(size * whole)
