"""One cache directory: block files, their index and claims.

    cache.db          the index (`index.py`), and its -wal and -shm
    00/ ... ff/       block files (`block_files.py`, `block_format.py`) under random names
    claims, waiting, loading   locked, never written (`claims.py`)
    care              locked by the process that sweeps the directory; its time is the last sweep
    opening           locked by the process that opens, makes or deletes the index

Any number of processes use a directory at once, any of them may be killed at any time, and other
programs may delete or change files: every block is checked when it is read, and damaged ones are
dropped. Nothing here raises after the directory was opened (`guarded_index.py`). Which blocks are
evicted for others: see `current_load.py`. All calls block: they are made in threads. The module is
long because it is all that a daemon does with a directory.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.cache.block_files import BlockFiles, new_name
from lazyfs.cache.block_format import Content, DamagedBlockError, sums_length
from lazyfs.cache.current_load import CurrentLoad
from lazyfs.cache.guarded_index import GuardedIndex, Side, locked
from lazyfs.cache.index import BlockIndex, Entered, Entry, Stored
from lazyfs.cache.space import Limits
from lazyfs.cache.sweep import is_due, sweep
from lazyfs.movers.pool import Movers

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# The log names this many damaged blocks.
DAMAGED_SHOWN = 10

# Content, block number, bytes.
Block = tuple[Content, int, memoryview]


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
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self.counters = CacheCounters()
        # Its present and maximum size in bytes, as `care` found them last.
        self.filling = (0, 0)
        self._files = BlockFiles(path)
        self._index = GuardedIndex(path, self._files)
        self._used: dict[str, float] = {}
        self._told = (0, 0)
        self._given_up: set[str] = set()
        self._load = CurrentLoad()
        self._writing: set[str] = set()

    def use(self, movers: Movers) -> None:
        """Have movers read and write blocks from now on."""
        self._files.movers = movers

    def open(self) -> None:
        """Open or create the directory; otherwise the first use does.

        Raises:
            CacheError: it cannot be made, written, or trusted.
            OSError: nothing can be made in it.
            IndexFailedError: its index does not work.
        """
        self._index.open()

    def present(self, content: Content) -> list[int]:
        """The blocks of a content that are here."""
        return self._index.attempt(Side.READING, lambda index: index.numbers(content.digest), [])

    def holds(self, content: Content, number: int) -> bool:
        """Whether a block is here."""
        key = _key(content, number)
        return self._index.attempt(
            Side.READING, lambda index: index.filename(key) is not None, False
        )

    def load(self, content: Content, number: int) -> memoryview | None:
        """A block's checked bytes, or None if they are not here.

        Parts of the block's file in the page cache are copied; the rest is read past the page
        cache, which should have the mounted file and not a second copy of it.
        """
        self._load.used()
        key = _key(content, number)
        data = self._index.attempt(
            Side.READING, lambda index: self._read(index, content, number), None
        )
        if data is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
            self._was_used(key)
        return data

    def load_part(self, content: Content, number: int, start: int, stop: int) -> memoryview | None:
        """Bytes `start` to `stop` of a block, checked; counts as a use, and not as a hit.

        None: the block is not here, or can only be read whole: its running sums are not known.
        """
        self._load.used()
        key = _key(content, number)
        data = self._index.attempt(
            Side.READING, lambda index: self._read_part(index, content, number, start, stop), None
        )
        if data is not None:
            self._was_used(key)
        return data

    def _was_used(self, key: str) -> None:
        self._given_up.discard(key)
        self._used[key] = time.time()

    def verify(self, content: Content, number: int) -> bool:
        """Read a block and check it; a damaged one is dropped. True if it is not here."""
        damaged = self.counters.damaged
        self._index.attempt(Side.READING, lambda index: self._read(index, content, number), None)
        return self.counters.damaged == damaged

    def put(self, content: Content, number: int, data: Buffer) -> bool:
        """Store a block, if there is room and the disk works."""
        return self.put_all([(content, number, memoryview(data))])[0]

    def put_all(self, blocks: Sequence[Block]) -> list[bool]:
        """Store blocks, as far as there is room and the disk works; returns which were stored.

        The index is changed twice, for any number of blocks.
        """
        self._load.used()
        kept = [False] * len(blocks)
        if self._load.is_declined:
            self.counters.declined += len(blocks)
        else:
            entries = [_entry(new_name(), content, number) for content, number, _ in blocks]
            names = [entry.filename for entry in entries]
            self._writing.update(names)
            try:
                left_out = self._index.attempt(
                    Side.WRITING, lambda index: self._write(index, blocks, entries, kept), 0
                )
            finally:
                self._writing.difference_update(names)
            self.counters.failed_writes += kept.count(False) - left_out
        return kept

    def drop(self, content: Content) -> None:
        """Remove all blocks of a content."""
        self._index.attempt(
            Side.WRITING, lambda index: self._files.remove(index.forget(content.digest)), None
        )  # fmt: skip

    def drop_older(self, used_before_s: float) -> int:
        """Remove blocks that were last used before a time (since the epoch); returns how many."""
        return self._index.attempt(
            Side.WRITING, lambda index: self._evict(index.forget_older(used_before_s)), 0
        )  # fmt: skip

    def shrink(self, size_bytes: int) -> int:
        """Remove the least recently used blocks down to a size; returns how many."""

        def shrink(index: BlockIndex) -> int:
            excess = index.used_bytes() - size_bytes
            return self._evict(index.shrink(excess, time.time())) if excess > 0 else 0

        return self._index.attempt(Side.WRITING, shrink, 0)

    def stored(self) -> list[Stored]:
        """The contents with blocks here, and how many."""
        return self._index.attempt(Side.READING, lambda index: index.contents(), [])

    def hits_and_misses(self) -> tuple[int, int]:
        """The numbers of hits and misses of all mounts since the index was made."""
        return self._index.attempt(Side.READING, lambda index: index.hits_and_misses(), (0, 0))

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
        return self._index.attempt(Side.READING, lambda index: index.used_bytes(), 0)

    def claim(self, content: Content, number: int) -> bool:
        """Claim a block; False if another process fetches it.

        With a full or failing disk each process fetches its own blocks.
        """
        claims = self._index.claims
        if claims is None or self._load.is_declined or any(map(self._index.is_resting, Side)):
            return True
        claims.bring(content.digest)
        return claims.claim(_key(content, number))

    def claim_alone(self, content: Content, number: int) -> bool:
        """Claim a block, unless another process may store blocks of the content. Does not block."""
        if self._index.claims is None or not self.claim(content, number):
            return False
        if not self._index.claims.is_alone(content.digest):
            self.release(content, number)
            return False
        self._load.used()
        self.counters.misses += 1
        return True

    def claim_absent(self, content: Content, number: int) -> bool:
        """Claim a block, unless it is here or another process fetches it."""
        if not self.claim(content, number):
            return False
        if self.holds(content, number):
            self.release(content, number)
            return False
        self.counters.misses += 1
        return True

    def release(self, content: Content, number: int) -> None:
        """Release the claim to a block."""
        if self._index.claims is not None:
            self._index.claims.release(_key(content, number))

    def is_claimed(self, content: Content, number: int) -> bool:
        """Whether another process fetches a block."""
        return self._index.claims is not None and self._index.claims.is_taken(_key(content, number))

    def set_waiting(self, content: Content, number: int, waiting: bool) -> None:
        """Let other processes see whether this one waits for one of their blocks."""
        if self._index.claims is not None:
            self._index.claims.set_waiting(_key(content, number), waiting)

    def others_wait(self) -> bool:
        """Whether other processes wait for blocks of this or of another one."""
        return self._index.claims is not None and self._index.claims.others_wait()

    def announce(self, plan: Sequence[Content]) -> None:
        """Announce that blocks of these contents will be needed, in this order."""
        self._load.used()
        self._index.attempt(Side.WRITING, lambda index: self._announce(index, plan), None)

    def set_loading(self, content: Content) -> None:
        """Let other processes see that this one loads a content."""
        if self._index.claims is not None:
            self._index.claims.set_loading(content.digest)

    def give_up(self, content: Content, numbers: Sequence[int]) -> bool:
        """Mark blocks as no longer needed in this load, so that they may be evicted for it.

        Returns:
            False if another process loads the content and may need them.
        """
        if self._index.claims is None or self._index.claims.others_load(content.digest):
            return False
        keys = [_key(content, number) for number in numbers]
        self._given_up.update(keys)
        self._index.attempt(
            Side.WRITING, lambda index: index.touch([(0.0, key) for key in keys]), None
        )
        self._load.gave_up()
        return True

    def care(self, plan: Sequence[Content]) -> None:
        """Do maintenance, about every ten seconds and at the end.

        Args:
            plan: the contents that a load will need, in order.
        """
        self._index.attempt(Side.WRITING, lambda index: self._care(index, plan), None)

    def _sweep(self, index: BlockIndex) -> None:
        adopt = (lambda name: self._adopt(index, name)) if self._index.is_anew else None
        sweep(index, self._files, self._index.claims, self._writing, adopt)
        self._index.is_anew = False

    def _announce(self, index: BlockIndex, plan: Sequence[Content]) -> None:
        now = time.time()
        keys = (
            _key(content, number) for content in plan for number in index.numbers(content.digest)
        )
        needed = (key for key in keys if key not in self._given_up)
        index.touch([(now - rank * 1e-6, key) for rank, key in enumerate(needed)])

    def _care(self, index: BlockIndex, plan: Sequence[Content]) -> None:
        self._tell_use(index)
        if self._load.needs_announcement:
            self._announce(index, plan)
            self._load.announced()
        used = index.used_bytes()
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), used)
        self.filling = used, allowed
        if used > allowed:
            self._evict(index.shrink(used - allowed, time.time()))
        with locked(self.path / "care", wait=False) as care:
            if care is not None and (self._index.is_anew or is_due(care)):
                self._sweep(index)
                os.utime(care)

    def _tell_use(self, index: BlockIndex) -> None:
        used, self._used = self._used, {}
        index.touch(
            sorted((moment, key) for key, moment in list(used.items()) if key not in self._given_up)
        )
        counts = self.counters.hits, self.counters.misses
        index.add_counts(counts[0] - self._told[0], counts[1] - self._told[1])
        self._told = counts

    def _read(self, index: BlockIndex, content: Content, number: int) -> memoryview | None:
        filename = index.filename(_key(content, number))
        if filename is None:
            return None
        return self._read_or_drop(
            index, _key(content, number), filename,
            lambda: self._files.read(filename, content, number),
        )  # fmt: skip

    def _read_part(
        self, index: BlockIndex, content: Content, number: int, start: int, stop: int
    ) -> memoryview | None:
        filename, sums = index.file_and_sums(_key(content, number)) or ("", b"")
        length = content.length(number)
        if len(sums) != sums_length(length):
            return None
        return self._read_or_drop(
            index, _key(content, number), filename,
            lambda: self._files.read_part(filename, length, sums, start, stop),
        )  # fmt: skip

    def _read_or_drop(
        self, index: BlockIndex, key: str, filename: str, read: Callable[[], memoryview]
    ) -> memoryview | None:
        """What is read of a block's file; None if it is gone or damaged, and then its row is."""
        try:
            return read()
        except FileNotFoundError:
            index.discard(key, filename)  # evicted meanwhile, or deleted
            return None
        except DamagedBlockError as error:
            self.counters.damaged += 1
            if self.counters.damaged <= DAMAGED_SHOWN:
                log.warning("dropped from the cache: %s %s", self._files.path(filename), error)
            index.discard(key, filename)
            self._files.remove([filename])
            return None

    def _write(
        self, index: BlockIndex, blocks: Sequence[Block], entries: Sequence[Entry],
        kept: list[bool],
    ) -> int:  # fmt: skip
        """Write blocks that are not here yet; returns how many were declined.

        Args:
            kept: set for each block that is here, also when this raises.
        """
        times_given_up = self._load.times_given_up
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), index.used_bytes())
        entered, left = index.reserve(entries, time.time(), allowed, self._load.may_leave_before_s)
        self._evict(left)
        new = [at for at, state in enumerate(entered) if state is Entered.NEW]
        sums, error = self._files.write_all([(entries[at].filename, *blocks[at]) for at in new])
        self._enter(index, entries, entered, dict(zip(new, sums, strict=False)), kept)
        if error is not None:
            raise error
        declined = entered.count(Entered.DECLINED)
        if declined:
            self._load.declined(times_given_up)
            self.counters.declined += declined
        return kept.count(False)

    def _enter(
        self, index: BlockIndex, entries: Sequence[Entry], entered: Sequence[Entered],
        written: Mapping[int, bytes], kept: list[bool],
    ) -> None:  # fmt: skip
        """Mark written files in the index, with their running sums, and remove the others."""
        completed = index.complete([(entries[at], sums) for at, sums in written.items()])
        for at, is_complete in zip(written, completed, strict=True):
            kept[at] = is_complete
        for at, state in enumerate(entered):
            if state is Entered.KNOWN:
                kept[at] = True
            elif state is Entered.NEW and not kept[at]:
                # It was not written, or the index was made again, or another process was faster.
                self._files.remove([entries[at].filename])
                index.discard(entries[at].key, entries[at].filename)

    def _adopt(self, index: BlockIndex, filename: str) -> bool:
        """Enter a file into a new index; False if it is not worth it."""
        found = self._files.describe(filename)
        if found is None or index.filename(_key(found.content, found.number)) is not None:
            return False
        size = found.content.file_length(found.number)
        used = index.used_bytes()
        allowed = self.limits.allowed_bytes(os.statvfs(self.path), used) + size
        entry = _entry(filename, found.content, found.number)
        entered, left = index.reserve([entry], found.modified_s, allowed, 0)
        self._evict(left)
        adopted = entered == [Entered.NEW] and index.complete([(entry, None)])[0]
        self.counters.adopted += adopted
        return adopted

    def _evict(self, filenames: Sequence[str]) -> int:
        self.counters.evicted += len(filenames)
        self._files.remove(filenames)
        return len(filenames)


def _key(content: Content, number: int) -> str:
    return f"{content.digest}:{number}"


def _entry(filename: str, content: Content, number: int) -> Entry:
    """The row of a block."""
    key, tag = _key(content, number), content.identity.decode()
    return Entry(key, filename, content.file_length(number), tag)
