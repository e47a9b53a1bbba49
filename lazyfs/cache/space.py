"""The size limits of a cache directory. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one directory.

    Attributes:
        size: maximum bytes of blocks, or a share (float) of the space that is free or used by the
            cache.
        reserve: bytes of the filesystem that stay free, or a share of its size.
    """

    size: int | float
    reserve: int | float = 0

    def allowed_bytes(self, disk: os.statvfs_result, used_bytes: int) -> int:
        """The maximum size of the cache now, in bytes.

        Args:
            disk: the filesystem's present usage.
            used_bytes: the present size of the cache.
        """
        free = disk.f_bavail * disk.f_frsize
        size = _part(self.size, free + used_bytes)
        return max(0, min(size, used_bytes + free - self.reserve_bytes(disk)))

    def reserve_bytes(self, disk: os.statvfs_result) -> int:
        """The space that stays free, in bytes."""
        return _part(self.reserve, disk.f_blocks * disk.f_frsize)


def _part(size: int | float, whole: int) -> int:
    return size if isinstance(size, int) else int(size * whole)
