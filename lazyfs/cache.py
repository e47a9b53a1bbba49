"""Blocks on the node's disk, kept by diskcache and shared by every mount that names the directory.

Each block is one file; SQLite knows which block it is and when it was used. A block is named by
what it is (endpoint, bucket, key, ETag, size, block size, number), so a replaced object is never
served from the cache and two mounts of one model share one copy.

All calls block: they are made from worker threads.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diskcache
from diskcache.core import MODE_BINARY

from lazyfs.blocks import block_count, block_length
from lazyfs.blocks.directio import read_file, write_file
from lazyfs.errors import CacheError
from lazyfs.tree import File

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# How long a full or failing disk is left alone before the next block is offered to it.
REST_S = 30.0


class BlockDisk(diskcache.Disk):  # type: ignore[misc]
    """How diskcache stores a block: a string as key, raw bytes in a file.

    diskcache's own serialiser unpickles what it finds (CVE-2025-69872). This one has no pickle:
    whatever is not a raw file under a string key is refused.
    """

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"a block's key is a str, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str):
            raise ValueError("not a block's key")
        return key

    def store(self, value: Buffer, read: bool, key: Any = None) -> tuple[int, int, str, None]:
        """Write a block to a new file. Raises OSError; a part that was written is removed."""
        filename, path = self.filename()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        view = memoryview(value)
        try:
            write_file(Path(path), view)
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
        return len(view), MODE_BINARY, filename, None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Path:
        """The path of a block's file. Raises OSError, which diskcache takes for a miss."""
        if mode != MODE_BINARY or filename is None:
            raise OSError(errno.EINVAL, "not a block")
        return Path(self._directory) / filename


class BlockCache:
    """The cache directory, opened.

    Args:
        directory: made if it is missing.
        size_limit: bytes, or a share (float) of the space that is free or already the cache's.
        block_size: of the mount that uses it.
        namespace: endpoint and bucket of that mount.

    Raises:
        CacheError: the directory cannot be made, written, or trusted.
    """

    def __init__(self, directory: Path, size_limit: float, block_size: int, namespace: str) -> None:
        self.directory = directory
        self._block_size = block_size
        self._namespace = namespace
        self._rest_until = 0.0
        self._lock = threading.Lock()
        self.writes_failed = 0
        _check_directory(directory)
        try:
            self._cache: Any = diskcache.Cache(
                str(directory),
                disk=BlockDisk,
                eviction_policy="least-recently-used",
                statistics=0,
                # SQLite's own cache and memory map would count against the daemon's memory.
                sqlite_cache_size=256,
                sqlite_mmap_size=0,
            )
            self._cache.reset("size_limit", self._limit_bytes(size_limit))
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise CacheError(f"--cache-dir: {directory}: cannot be opened: {error}") from error

    def present(self, file: File) -> list[int]:
        """Which blocks of a file are on disk. Costs about 15 microseconds a block."""
        content = self._content(file)
        try:
            return [
                number
                for number in range(block_count(file.size_bytes, self._block_size))
                if f"{content}:{number}" in self._cache
            ]
        except (sqlite3.Error, diskcache.Timeout) as error:
            self._rest(f"cannot be read: {error}")
            return []

    def load(self, file: File, number: int) -> memoryview | None:
        """A block's bytes, or None when the cache does not hold it.

        What the kernel still has of the block's file is copied; the rest is read past the page
        cache, which is to hold the mounted file and not a second copy of it.
        """
        length = block_length(file.size_bytes, self._block_size, number)
        key = f"{self._content(file)}:{number}"
        try:
            path = self._cache.get(key)
            if path is None:
                return None
            view = read_file(path, length)
        except FileNotFoundError:
            return None  # evicted between the two lines above
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            self._rest(f"cannot be read: {error}")
            return None
        if view is None:
            log.warning("dropped a block of wrong length from the cache: %s", path)
            self._delete(key)
        return view

    def put(self, file: File, number: int, data: Buffer) -> bool:
        """Keep a block, and let the least recently used ones go when the cache is full.

        Returns:
            False if it was not kept: the disk is full or failing. That is logged, and the disk
            is left alone for half a minute; a mount works without it.
        """
        if time.monotonic() < self._rest_until:
            self.writes_failed += 1
            return False
        try:
            return bool(self._cache.set(f"{self._content(file)}:{number}", data))
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            self.writes_failed += 1
            self._rest(f"cannot be written: {error}")
            return False

    def _content(self, file: File) -> str:
        identity = "\0".join(
            (self._namespace, file.key, file.etag, str(file.size_bytes), str(self._block_size))
        )
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def _delete(self, key: str) -> None:
        try:
            self._cache.delete(key)
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            self._rest(f"cannot be written: {error}")

    def _rest(self, why: str) -> None:
        with self._lock:
            if time.monotonic() >= self._rest_until:
                log.warning(
                    "cache directory %s %s; going on without it for %.0f s",
                    self.directory,
                    why,
                    REST_S,
                )
            self._rest_until = time.monotonic() + REST_S

    def _limit_bytes(self, size_limit: float) -> int:
        if isinstance(size_limit, int):
            return size_limit
        disk = os.statvfs(self.directory)
        return int(size_limit * (disk.f_bavail * disk.f_frsize + self._cache.volume()))


def _check_directory(directory: Path) -> None:
    """Make the directory if need be, and refuse one that others could write into."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError as error:
        raise CacheError(
            f"--cache-dir: {directory}: cannot be made: {error.strerror}; name another or 'none'"
        ) from error
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise CacheError(
            f"--cache-dir: {directory}: not writable; name another directory or 'none'"
        )
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise CacheError(
            f"--cache-dir: {directory}: other users could put bytes into it; "
            f"chown it to this user and chmod go-w"
        )


def default_directory() -> Path:
    """Where the cache is when no option says: for root, and for a person."""
    if os.geteuid() == 0:
        return Path("/var/cache/lazyfs")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lazyfs"
