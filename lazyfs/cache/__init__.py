"""The node's cache: blocks on disk, shared by every mount that names the same directories.

A block is identified by its content (`Content`) and its number, so a replaced object is never
served from the cache, and all mounts of one model share one copy. A mount gets a block only
for an object that its own credentials have listed with that ETag.

Mounts use `BlockCache`; `CacheDirectory` (`directory.py`) does the work, one for each directory.
All calls block: they are made in threads (`lazyfs/threads.py`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs import cache_place
from lazyfs.blocks import Span
from lazyfs.cache.block_format import Content
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.index import IndexFailedError, IndexFullError
from lazyfs.cache.space import Limits
from lazyfs.errors import CacheError
from lazyfs.listed_object import File
from lazyfs.movers.pool import Movers
from lazyfs.options.mount_options import MountOptions
from lazyfs.patience import begin

if TYPE_CHECKING:
    from typing_extensions import Buffer


log = logging.getLogger(__name__)

# How often users of a cache call `BlockCache.care`.
CARE_S = 10.0


class Claim(Enum):
    """Which process fetches a block that is not in the cache."""

    OURS = "ours"
    THEIRS = "theirs"


class BlockCache:
    """The cache as one mount uses it.

    Args:
        directories: each block is in one of them; created if they are missing.
        limits: those of each directory.
        endpoint: that of the mount's objects; may be set after the cache was opened.
        bucket: that of the mount's objects.
        block_size: the mount's, in bytes.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        limits: Limits,
        endpoint: str,
        bucket: str,
        block_size: int,
    ) -> None:
        self.directories = [CacheDirectory(path, limits) for path in directories]
        # Also those of other parts, see `parts`.
        self._all_directories = self.directories
        self.block_size = block_size
        self._limits = limits
        self.endpoint = endpoint
        self._bucket = bucket
        self._contents: dict[int, Content] = {}

    @classmethod
    def of(cls, options: MountOptions, endpoint: str, bucket: str) -> BlockCache | None:
        """The cache that a mount's options name; None if they name none. Nothing is opened."""
        directories = cache_place.directories(options.cache_dir)
        if not directories:
            return None
        limits = Limits(options.cache_size, options.cache_reserve)
        return cls(directories, limits, endpoint, bucket, options.block_size)

    def description(self) -> dict[str, Any]:
        """The values with which another process can use the same cache, for JSON."""
        return {
            "directories": [str(directory.path) for directory in self.directories],
            "limits": asdict(self._limits),
            "endpoint": self.endpoint,
            "bucket": self._bucket,
            "block_size": self.block_size,
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> BlockCache:
        """The cache of a `description`. Nothing is opened."""
        directories = [Path(path) for path in description["directories"]]
        limits = Limits(**description["limits"])
        of_mount = {key: description[key] for key in ("endpoint", "bucket", "block_size")}
        return cls(directories, limits, **of_mount)

    def use(self, movers: Movers) -> None:
        """Have movers read and write blocks from now on."""
        for directory in self.directories:
            directory.use(movers)

    def open(self) -> None:
        """Open all directories. Otherwise they are opened at first use.

        A mount does without a directory whose disk is full, until there is room.

        Raises:
            CacheError: a directory cannot be made, written, or trusted.
        """
        for directory in self.directories:
            _open(directory)

    def begin_to_open(self) -> list[Future[None]]:
        """The same, each directory in a thread of its own."""
        return [begin(partial(_open, directory)) for directory in self.directories]

    def parts(self) -> list[BlockCache]:
        """A cache for each directory, with the blocks that belong there."""
        parts = [copy(self) for _ in self.directories]
        for part, directory in zip(parts, self.directories, strict=True):
            part.directories = [directory]
        return parts

    @property
    def name(self) -> str:
        """The directories."""
        return ":".join(str(directory.path) for directory in self.directories)

    def has_place_for(self, file: File, number: int) -> bool:
        """Whether a block belongs into a directory of this part of the cache."""
        return self._home(self._content(file), number) in self.directories

    def present(self, file: File) -> list[int]:
        """Which blocks of a file are on disk."""
        content = self._content(file)
        return sorted(
            number
            for directory in self.directories
            for number in directory.present(content)
            if self._home(content, number) is directory
        )

    def holds(self, file: File, number: int) -> bool:
        """Whether a block is on disk."""
        content = self._content(file)
        return self._home(content, number).holds(content, number)

    def load_or_claim(self, file: File, number: int) -> memoryview | Claim:
        """A block's bytes, or which process fetches it.

        If this one does, `put` or `release` must follow.
        """
        content = self._content(file)
        home = self._home(content, number)
        data = home.load(content, number)
        if data is not None:
            return data
        if not home.claim(content, number):
            return Claim.THEIRS
        if home.holds(content, number):
            # Another process stored it between our look and our claim.
            data = home.load(content, number)
            if data is not None:
                home.release(content, number)
                return data
        return Claim.OURS

    def claim_absent(self, file: File, numbers: Iterable[int]) -> set[int]:
        """Claim those of a file's blocks that are not here; returns which this process fetches.

        `put` or `release` must follow for each.
        """
        content = self._content(file)
        return {
            number
            for number in numbers
            if self._home(content, number).claim_absent(content, number)
        }

    def claim_alone(self, file: File, number: int) -> bool:
        """Claim a block of a file, unless another process may store some. Does not block.

        If this returns true, `put` or `release` must follow.
        """
        content = self._content(file)
        return self._home(content, number).claim_alone(content, number)

    def load(self, file: File, number: int) -> memoryview | None:
        """A block's bytes, if it is on disk."""
        content = self._content(file)
        return self._home(content, number).load(content, number)

    def load_part(self, file: File, span: Span) -> memoryview | None:
        """A part of a block; None if it is not on disk, or can only be loaded with all of it."""
        content = self._content(file)
        return self._home(content, span.number).load_part(content, *span)

    def drop(self, file: File) -> None:
        """Forget all blocks of a file."""
        for directory in self.directories:
            directory.drop(self._content(file))

    def put(self, file: File, number: int, data: Buffer) -> bool:
        """Store a block and release its claim; False if there is no room or the disk fails."""
        return self.put_all([(file, number, data)])[0]

    def put_all(self, blocks: Sequence[tuple[File, int, Buffer]]) -> list[bool]:
        """Store blocks: file, number and bytes of each. Returns which were stored; see `put`."""
        kept = [False] * len(blocks)
        of_homes: defaultdict[CacheDirectory, list[int]] = defaultdict(list)
        contents = [self._content(file) for file, _, _ in blocks]
        for at, (_, number, _) in enumerate(blocks):
            of_homes[self._home(contents[at], number)].append(at)
        for home, positions in of_homes.items():
            try:
                put = [(contents[at], blocks[at][1], memoryview(blocks[at][2])) for at in positions]
                for at, is_kept in zip(positions, home.put_all(put), strict=True):
                    kept[at] = is_kept
            finally:
                for at in positions:
                    home.release(contents[at], blocks[at][1])
        return kept

    def release(self, file: File, number: int) -> None:
        """Release the claim to a block that will not be stored. Does not block."""
        content = self._content(file)
        self._home(content, number).release(content, number)

    def is_claimed(self, file: File, number: int) -> bool:
        """Whether another process fetches a block. Does not block."""
        content = self._content(file)
        return self._home(content, number).is_claimed(content, number)

    def set_waiting(self, file: File, number: int, waiting: bool) -> None:
        """Let other processes see whether this one waits for a block. Does not block."""
        content = self._content(file)
        self._home(content, number).set_waiting(content, number, waiting)

    def others_wait(self) -> bool:
        """Whether other processes wait for blocks to be stored. Does not block."""
        return any(directory.others_wait() for directory in self.directories)

    def announce(self, files: Iterable[File]) -> None:
        """Announce that the blocks of these files will be needed, in this order."""
        contents = [self._content(file) for file in files]
        for directory in self.directories:
            directory.announce(contents)

    def set_loading(self, file: File) -> None:
        """Let other processes see that this one needs a file's blocks. Does not block."""
        content = self._content(file)
        for directory in self.directories:
            directory.set_loading(content)

    def give_up(self, file: File, numbers: Iterable[int]) -> bool:
        """Mark blocks as no longer needed in this load; False if others may need them."""
        content = self._content(file)
        given_up = [
            directory.give_up(content, here)
            for directory in self.directories
            if (here := [n for n in numbers if self._home(content, n) is directory])
        ]
        return all(given_up)

    def care(self, plan: Iterable[File]) -> None:
        """Do maintenance, about every ten seconds and at the end.

        Args:
            plan: the files that a load will need, in order.
        """
        contents = [self._content(file) for file in plan]
        for directory in self.directories:
            directory.care(contents)

    def _content(self, file: File) -> Content:
        content = self._contents.get(file.inode)
        if content is None:
            content = self._contents[file.inode] = Content(
                self.endpoint, self._bucket, file.key, file.etag, file.size_bytes, self.block_size
            )
        return content

    def _home(self, content: Content, number: int) -> CacheDirectory:
        """The directory of a block: if one is added or removed, few blocks move."""
        if len(self._all_directories) == 1:
            return self._all_directories[0]

        def weight(directory: CacheDirectory) -> bytes:
            text = f"{directory.path}:{content.digest}:{number}"
            return hashlib.blake2b(text.encode(), digest_size=8).digest()

        return max(self._all_directories, key=weight)


def _open(directory: CacheDirectory) -> None:
    """Open a directory, unless its disk is full. Raises CacheError."""
    try:
        directory.open()
    except (OSError, IndexFailedError) as error:
        if not _is_full(error):
            raise CacheError(
                f"--cache-dir: {directory.path}: cannot be used: {error}; name another or 'none'"
            ) from error
        log.warning(
            "--cache-dir: %s: its disk is full; blocks are cached when there is room",
            directory.path,
        )


def _is_full(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, IndexFullError)
