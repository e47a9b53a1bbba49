"""One cache directory: block files, their index, claims, and eviction.

    cache.db          the index (`index.py`), and its -wal and -shm
    00/ ... ff/       block files (`blockfile.py`) under random names
    claims, waiting, loading   locked, never written (`claims.py`)
    care              locked by the process that sweeps the directory; its time is the last sweep
    opening           locked by the process that opens, makes or deletes the index

Any number of processes use a directory at once, any of them may be killed at any time, and other
programs may delete or change files: every block is checked when it is read, and damaged ones are
dropped. Nothing here raises after the directory was opened: a failing disk is left alone for a
while (it *rests*), and the mount continues without it.

Eviction. Blocks are evicted in the order of their last use, or last *announcement*: a mount
announces the blocks in its plan, the first ones last, so that these are evicted last. But a block
is not evicted for another one of the same load: blocks used or announced since the load began stay
(for an hour at most), and the new block is *declined*. So a cache smaller than a model keeps a part
of it, instead of evicting each block just before it is needed again. The exception are blocks that
the load *gave up*: its readers have read them, and no other process loads the content.

All calls block: they are made from worker threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lazyfs.blocks.buffers import ALIGNMENT
from lazyfs.cache.block_io import read_block, write_block
from lazyfs.cache.blockfile import Content, DamagedBlockError, parse_tail
from lazyfs.cache.claims import Claims
from lazyfs.cache.index import (
    FOLDERS,
    INDEX_NAME,
    BlockIndex,
    Entered,
    Entry,
    IndexCorruptError,
    IndexFailedError,
    Stored,
    remove_index,
)
from lazyfs.cache.space import Limits
from lazyfs.movers.pool import Movers

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_FOLDER = re.compile("[0-9a-f]{2}")

# How long a full or failing disk is left alone before it is tried again.
REST_S = 30.0
# A load has ended when the cache was not used for so long.
IDLE_S = 120.0
# Blocks used within the shorter time are never evicted; those used within the longer one are not
# evicted for the load that used them.
SHORTEST_STAY_S, LONGEST_STAY_S = 45.0, 3600.0
# During a load the blocks in the plan are announced again this often.
ANNOUNCE_S = 20.0
# After a block was declined, the next ones are too, for this time.
DECLINE_S = 1.0
# How often files without a row and rows without a file are removed.
SWEEP_S = 3600.0
# The log names at most so many damaged blocks.
DAMAGED_SHOWN = 10

CARE, OPENING = "care", "opening"
_FILENAME = re.compile("[0-9a-f]{2}/[0-9a-f]{30}")
# Content, block number, bytes.
Block = tuple[Content, int, memoryview]
T = TypeVar("T")


class Side(Enum):
    """The sides of a directory, which fail separately: a full disk can be read."""

    READING = "read"
    WRITING = "written"


@dataclass
class CacheCounters:
    """Counts since the directory was opened, in blocks."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    declined: int = 0
    evicted: int = 0
    failed_writes: int = 0
    adopted: int = 0


class CacheDirectory:
    """A directory of cached blocks.

    Args:
        path: created if it is missing.
        limits: its size limits.

    Attributes:
        movers: read and write files of blocks, where there are any.
    """

    movers: Movers | None = None

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self.counters = CacheCounters()
        # Its present and maximum size in bytes, as `care` found them last.
        self.filling = (0, 0)
        self._opening = threading.Lock()
        self._index: BlockIndex | None = None
        self._claims: Claims | None = None
        self._rests_until: dict[Side, float] = {}
        self._has_index_anew = False
        self._used: dict[str, float] = {}
        self._told = (0, 0)
        self._given_up: set[str] = set()
        self._load_began = self._last_asked = time.monotonic()
        self._announced = self._declined = float("-inf")

    def open(self) -> None:
        """Open or create the directory; otherwise the first use does.

        Raises:
            OSError: it cannot be created or written.
            IndexFailedError: its index does not work.
        """
        try:
            self._current_index()
        except IndexCorruptError as error:
            self._replace_index(error)
            self._current_index()

    def present(self, content: Content) -> list[int]:
        """The blocks of a content that are here."""
        return self._attempt(Side.READING, lambda index: index.numbers(content.digest), [])

    def holds(self, content: Content, number: int) -> bool:
        """Whether a block is here."""
        key = _key(content, number)
        return self._attempt(Side.READING, lambda index: index.filename(key) is not None, False)

    def load(self, content: Content, number: int) -> memoryview | None:
        """A block's checked bytes, or None if they are not here.

        Parts of the block's file in the page cache are copied; the rest is read past the page
        cache, which should have the mounted file and not a second copy of it.
        """
        self._asked()
        key = _key(content, number)
        data = self._attempt(Side.READING, lambda index: self._read(index, content, number), None)
        if data is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
            self._used[key] = time.time()
            self._given_up.discard(key)
        return data

    def verify(self, content: Content, number: int) -> bool:
        """Read a block and check it; a damaged one is dropped. True if it is not here."""
        damaged = self.counters.damaged
        self._attempt(Side.READING, lambda index: self._read(index, content, number), None)
        return self.counters.damaged == damaged

    def put(self, content: Content, number: int, data: Buffer) -> bool:
        """Store a block, if there is room and the disk works."""
        return self.put_all([(content, number, memoryview(data))])[0]

    def put_all(self, blocks: Sequence[Block]) -> list[bool]:
        """Store blocks, as far as there is room and the disk works; returns which were stored.

        The index is changed twice, for any number of blocks.
        """
        self._asked()
        kept = [False] * len(blocks)
        if self._is_declining():
            self.counters.declined += len(blocks)
        else:
            left_out = self._attempt(
                Side.WRITING, lambda index: self._write(index, blocks, kept), 0
            )
            self.counters.failed_writes += kept.count(False) - left_out
        return kept

    def drop(self, content: Content) -> None:
        """Remove all blocks of a content."""
        self._attempt(
            Side.WRITING, lambda index: self._remove(index.forget(content.digest)), None
        )  # fmt: skip

    def drop_older(self, used_before_s: float) -> int:
        """Remove blocks that were last used before a time (since the epoch); returns how many."""
        return self._attempt(
            Side.WRITING, lambda index: self._evict(index.forget_older(used_before_s)), 0
        )  # fmt: skip

    def shrink(self, size_bytes: int) -> int:
        """Remove the least recently used blocks down to a size; returns how many."""

        def shrink(index: BlockIndex) -> int:
            excess = index.used_bytes() - size_bytes
            return self._evict(index.shrink(excess, time.time())) if excess > 0 else 0

        return self._attempt(Side.WRITING, shrink, 0)

    def stored(self) -> list[Stored]:
        """The contents with blocks here, and how many."""
        return self._attempt(Side.READING, lambda index: index.contents(), [])

    def hits_and_misses(self) -> tuple[int, int]:
        """The numbers of hits and misses of all mounts since the index was made."""
        return self._attempt(Side.READING, lambda index: index.hits_and_misses(), (0, 0))

    def space(self) -> dict[str, int]:
        """The used and maximum size, and the free and reserved space of the disk."""
        used, disk = self.used_bytes(), os.statvfs(self.path)
        return {
            "used_bytes": used,
            "allowed_bytes": self.limits.allowed_bytes(disk, used),
            "free_bytes": disk.f_bavail * disk.f_frsize,
            "reserve_bytes": self.limits.reserve_bytes(disk),
        }

    def used_bytes(self) -> int:
        """The size of all blocks in bytes."""
        return self._attempt(Side.READING, lambda index: index.used_bytes(), 0)

    def claim(self, content: Content, number: int) -> bool:
        """Claim a block; False if another process fetches it.

        With a full or failing disk each process fetches its own blocks.
        """
        useless = any(map(self._is_resting, Side)) or self._is_declining()
        return useless or self._claims is None or self._claims.claim(_key(content, number))

    def release(self, content: Content, number: int) -> None:
        """Release the claim to a block."""
        if self._claims is not None:
            self._claims.release(_key(content, number))

    def is_claimed(self, content: Content, number: int) -> bool:
        """Whether another process fetches a block."""
        return self._claims is not None and self._claims.is_taken(_key(content, number))

    def set_waiting(self, content: Content, number: int, waiting: bool) -> None:
        """Let other processes see whether this one waits for a block of theirs."""
        if self._claims is not None:
            self._claims.set_waiting(_key(content, number), waiting)

    def others_wait(self) -> bool:
        """Whether other processes wait for blocks of this or of another one."""
        return self._claims is not None and self._claims.others_wait()

    def announce(self, plan: Sequence[Content]) -> None:
        """Announce that blocks of these contents will be needed, in this order."""
        self._asked()
        self._attempt(Side.WRITING, lambda index: self._announce(index, plan), None)

    def set_loading(self, content: Content) -> None:
        """Let other processes see that this one loads a content."""
        if self._claims is not None:
            self._claims.set_loading(content.digest)

    def give_up(self, content: Content, numbers: Sequence[int]) -> bool:
        """Mark blocks as no longer needed in this load, so that they may be evicted for it.

        Returns:
            False if another process loads the content and may need them.
        """
        if self._claims is None or self._claims.others_load(content.digest):
            return False
        keys = [_key(content, number) for number in numbers]
        self._given_up.update(keys)
        self._attempt(Side.WRITING, lambda index: index.touch([(0.0, key) for key in keys]), None)
        self._declined = float("-inf")
        return True

    def care(self, plan: Sequence[Content]) -> None:
        """Do maintenance, about every ten seconds and at the end.

        Args:
            plan: the contents that a load will need, in order.
        """
        self._attempt(Side.WRITING, lambda index: self._care(index, plan), None)

    def sweep(self, index: BlockIndex) -> None:
        """Remove files without a row and rows without a file.

        If the index was lost, rows are made again from the files.
        """
        files = [name for folder in self._folders() for name in self._files(folder)]
        # Rows after files: a file that was listed had its row before it existed.
        rows = {row.filename: row for row in index.rows()}
        for filename in files:
            if filename not in rows:
                adopted = self._has_index_anew and self._adopt(index, filename)
                if not adopted:
                    self._remove([filename])
        there = set(files)
        for row in rows.values():
            unfinished = row.is_pending and not (self._claims and self._claims.is_taken(row.key))
            if unfinished or not (row.filename in there or self._path(row.filename).exists()):
                index.discard(row.key, row.filename)
                self._remove([row.filename])
        self._has_index_anew = False

    def _announce(self, index: BlockIndex, plan: Sequence[Content]) -> None:
        now = time.time()
        keys = (
            _key_of(content.digest, number)
            for content in plan
            for number in index.numbers(content.digest)
        )
        needed = (key for key in keys if key not in self._given_up)
        index.touch([(now - rank * 1e-6, key) for rank, key in enumerate(needed)])

    def _care(self, index: BlockIndex, plan: Sequence[Content]) -> None:
        self._tell_use(index)
        now = time.monotonic()
        is_loading = now < self._last_asked + IDLE_S
        if is_loading and now >= max(self._announced + ANNOUNCE_S, self._load_began):
            self._announce(index, plan)
            self._announced = time.monotonic()
        used = index.used_bytes()
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), used)
        self.filling = used, allowed
        excess = used - allowed
        if excess > 0:
            self._evict(index.shrink(excess, time.time()))
        with self._exclusively(CARE, wait=False) as care:
            if care is not None and (self._has_index_anew or _is_older(care, SWEEP_S)):
                self.sweep(index)
                os.utime(care)

    def _tell_use(self, index: BlockIndex) -> None:
        used, self._used = self._used, {}
        index.touch(sorted((moment, key) for key, moment in list(used.items())))
        counts = self.counters.hits, self.counters.misses
        index.add_counts(counts[0] - self._told[0], counts[1] - self._told[1])
        self._told = counts

    def _read(self, index: BlockIndex, content: Content, number: int) -> memoryview | None:
        key = _key(content, number)
        filename = index.filename(key)
        if filename is None:
            return None
        try:
            return read_block(self._path(filename), content, number, self.movers)
        except FileNotFoundError:
            index.discard(key, filename)  # evicted meanwhile, or deleted
            return None
        except DamagedBlockError as error:
            self.counters.damaged += 1
            if self.counters.damaged <= DAMAGED_SHOWN:
                log.warning("dropped from the cache: %s %s", self._path(filename), error)
            index.discard(key, filename)
            self._remove([filename])
            return None

    def _write(self, index: BlockIndex, blocks: Sequence[Block], kept: list[bool]) -> int:
        """Write blocks that are not here yet; returns how many were declined.

        Args:
            kept: set for each block that is here, also when this raises.
        """
        entries = [
            Entry(_key(c, n), _new_name(), c.file_length(n), c.identity.decode())
            for c, n, _ in blocks
        ]
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), index.used_bytes())
        entered, left = index.reserve(entries, time.time(), allowed, self._may_leave_before())
        self._evict(left)
        written: list[int] = []
        try:
            for at in (at for at, state in enumerate(entered) if state is Entered.NEW):
                content, number, data = blocks[at]
                write_block(self._path(entries[at].filename), content, number, data, self.movers)
                written.append(at)
        except OSError:
            self._enter(index, entries, entered, written, kept)
            raise
        self._enter(index, entries, entered, written, kept)
        declined = entered.count(Entered.DECLINED)
        if declined:
            self._declined = time.monotonic()
            self.counters.declined += declined
        return kept.count(False)

    def _enter(
        self, index: BlockIndex, entries: Sequence[Entry], entered: Sequence[Entered],
        written: Sequence[int], kept: list[bool],
    ) -> None:  # fmt: skip
        """Mark written files in the index, and remove the others."""
        completed = index.complete([entries[at] for at in written])
        for at, is_complete in zip(written, completed, strict=True):
            kept[at] = is_complete
        for at, state in enumerate(entered):
            if state is Entered.KNOWN:
                kept[at] = True
            elif state is Entered.NEW and not kept[at]:
                # It was not written, or the index was made again, or another process was faster.
                self._remove([entries[at].filename])
                index.discard(entries[at].key, entries[at].filename)

    def _adopt(self, index: BlockIndex, filename: str) -> bool:
        """Enter a file into a new index; False if it is not worth it."""
        try:
            with open(self._path(filename), "rb") as file:
                status = os.fstat(file.fileno())
                file.seek(max(0, status.st_size - 2 * ALIGNMENT))
                content, number, _ = parse_tail(file.read())
        except (OSError, DamagedBlockError):
            return False
        key, size = _key(content, number), content.file_length(number)
        tag = content.identity.decode()
        if size != status.st_size or index.filename(key) is not None:
            return False
        used = index.used_bytes()
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), used) + size
        entry = Entry(key, filename, size, tag)
        entered, left = index.reserve([entry], status.st_mtime, allowed, 0)
        self._evict(left)
        adopted = entered == [Entered.NEW] and index.complete([entry])[0]
        self.counters.adopted += adopted
        return adopted

    def _evict(self, filenames: Sequence[str]) -> int:
        self.counters.evicted += len(filenames)
        self._remove(filenames)
        return len(filenames)

    def _folders(self) -> list[str]:
        """The folders of block files: `FOLDERS`, and others in caches of earlier versions."""
        return [path.name for path in self.path.iterdir() if _FOLDER.fullmatch(path.name)]

    def _files(self, folder: str) -> list[str]:
        """The block files of a folder; other files are not touched."""
        names = (f"{folder}/{path.name}" for path in Path(self.path, folder).iterdir())
        return [name for name in names if _FILENAME.fullmatch(name)]

    def _remove(self, filenames: Sequence[str]) -> None:
        for filename in filenames:
            with contextlib.suppress(FileNotFoundError):
                self._path(filename).unlink()

    def _path(self, filename: str) -> Path:
        """The path of a block's file. Raises IndexCorruptError if the name is not one of ours."""
        if not _FILENAME.fullmatch(filename):
            raise IndexCorruptError(f"its index names files that nobody wrote: {filename!r}")
        return self.path / filename

    def _asked(self) -> None:
        now = time.monotonic()
        if now > self._last_asked + IDLE_S:
            self._load_began = now
        self._last_asked = now

    def _may_leave_before(self) -> float:
        """Blocks used before this time (seconds since the epoch) may be evicted."""
        load_s = time.monotonic() - self._load_began
        if self._announced < self._load_began:
            load_s = LONGEST_STAY_S  # the needs of the load are not known yet
        return time.time() - min(max(load_s, SHORTEST_STAY_S), LONGEST_STAY_S)

    def _is_declining(self) -> bool:
        return time.monotonic() < self._declined + DECLINE_S

    def _attempt(self, side: Side, action: Callable[[BlockIndex], T], otherwise: T) -> T:
        """Run an operation on the directory; errors are logged, and then the directory rests."""
        if self._is_resting(side):
            return otherwise
        try:
            try:
                result = action(self._current_index())
            except IndexCorruptError as error:
                self._replace_index(error)
                result = otherwise
        except (OSError, IndexFailedError) as error:
            self._rest(side, error)
            return otherwise
        if self._rests_until.pop(side, None):
            log.info("cache directory %s can be %s again", self.path, side.value)
        return result

    def _rest(self, side: Side, error: Exception) -> None:
        if side not in self._rests_until:
            log.warning(
                "cache directory %s cannot be %s: %s; continuing without it, and trying again "
                "every %.0f s", self.path, side.value, error, REST_S,
            )  # fmt: skip
        self._rests_until[side] = time.monotonic() + REST_S

    def _is_resting(self, side: Side) -> bool:
        return time.monotonic() < self._rests_until.get(side, 0.0)

    def _current_index(self) -> BlockIndex:
        """The present index of the directory; the index or the directory may have been replaced."""
        index = self._index
        if index is None or not index.is_current:
            with self._opening:
                if self._index is None or not self._index.is_current:
                    self._index = self._open()
                index = self._index
        return index

    def _open(self) -> BlockIndex:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in FOLDERS:
            Path(self.path, folder).mkdir(exist_ok=True, mode=0o700)
        self._claims = Claims(self.path)
        file = Path(self.path, INDEX_NAME)
        with self._exclusively(OPENING, wait=True):
            if not file.exists() or not file.stat().st_size:
                remove_index(self.path)
                self._has_index_anew = True
            # SQLite gives its other files the mode of this one.
            with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb") as index:
                os.fchmod(index.fileno(), 0o600)
            return BlockIndex(self.path)

    def _replace_index(self, error: IndexCorruptError) -> None:
        """Delete a damaged index, unless another process has done so."""
        with self._opening, self._exclusively(OPENING, wait=True):
            if self._index is None or self._index.is_current:
                log.warning(
                    "cache directory %s: %s; rebuilding it from the files", self.path, error
                )
                remove_index(self.path)
                self._has_index_anew = True
            self._index = None

    @contextmanager
    def _exclusively(self, name: str, *, wait: bool) -> Iterator[int | None]:
        """A lock among all processes; None if another one has it and `wait` is false."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        care: int | None
        with open(os.open(self.path / name, flags, 0o600), "rb") as file:
            care = file.fileno()
            try:
                fcntl.flock(care, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                care = None
            yield care


def _key(content: Content, number: int) -> str:
    return _key_of(content.digest, number)


def _key_of(digest: str, number: int) -> str:
    return f"{digest}:{number}"


def _new_name() -> str:
    name = os.urandom(16).hex()
    return f"{name[0]}0/{name[2:]}"


def _is_older(descriptor: int, age_s: float) -> bool:
    """Whether a file was not changed for this long; times in the future count as old."""
    return not 0 <= time.time() - os.fstat(descriptor).st_mtime < age_s
