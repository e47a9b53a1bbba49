"""The index of a cache directory: an SQLite table, managed by diskcache, for many processes.

diskcache provides the database: schema, a connection for each thread, transactions, counts kept by
triggers. The queries are ours, because a cache of models evicts by other rules than a cache of
values: a read writes nothing here, and uses are recorded in batches.

A block's row exists before its file and until after it: `PENDING` while it is written. So the space
of files that are being written counts, and a file without a row is an orphan. The value of a row
that is ready is the running sums of the block's pieces. It has none if an older version of lazyfs
wrote the block, or if the row was made again from the file.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import diskcache
from diskcache.core import DBNAME, MODE_BINARY, MODE_NONE

INDEX_NAME: str = DBNAME
READY, PENDING = MODE_BINARY, MODE_NONE
# Blocks are spread over these directories. Making many of them takes longer than the database.
FOLDERS = tuple(f"{number:x}0" for number in range(16))
# A process that is stopped in a transaction makes others wait for at most this long.
LOCK_TIMEOUT_S = 5.0
# Files beside the database that belong to it (https://sqlite.org/wal.html).
_COMPANIONS = ("", "-wal", "-shm")

T = TypeVar("T")


class IndexFailedError(Exception):
    """The database did not answer: it is locked, full, not writable, or failing."""


class IndexFullError(IndexFailedError):
    """The disk of the database is full."""


class IndexCorruptError(IndexFailedError):
    """The database is damaged and must be made again."""


class Row(NamedTuple):
    """A block in the table. Times are seconds since the epoch."""

    key: str
    filename: str
    size_bytes: int
    used_s: float
    is_pending: bool


class Entry(NamedTuple):
    """A block to write; `tag` is the identity of its content."""

    key: str
    filename: str
    size_bytes: int
    tag: str


class Entered(Enum):
    """The result of entering a block: NEW must be written, KNOWN exists."""

    NEW = "new"
    KNOWN = "known"
    DECLINED = "declined"


class Stored(NamedTuple):
    """The blocks of one content; the last one that is there has a number. Times are seconds since
    the epoch."""

    tag: str
    blocks: int
    last_number: int
    stored_s: float
    used_s: float


class _NoValues(diskcache.Disk):  # type: ignore[misc]
    """Keys are texts, and diskcache stores no values: its serialiser unpickles what it finds on
    disk (CVE-2025-69872), and nothing here may ever reach it. Running sums are read as they are."""

    def put(self, key: Any) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError(f"a block's key is a str, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or not isinstance(key, str):
            raise ValueError("not a block's key")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> Any:
        raise TypeError("blocks are not stored as values")

    fetch = store


def _asks(method: Callable[..., T]) -> Callable[..., T]:
    """Turn what SQLite and diskcache raise into the errors of this module."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> T:
        with _index_errors():
            return method(*args, **kwargs)

    return wrapped


@contextmanager
def _index_errors() -> Iterator[None]:
    try:
        yield
    except diskcache.Timeout as error:
        # diskcache raises it for every failure to begin a transaction.
        cause = error.__context__
        if isinstance(cause, sqlite3.Error):
            raise _from_sqlite(cause) from None
        raise IndexFailedError("its index is locked by another process") from None
    except sqlite3.Error as error:
        raise _from_sqlite(error) from error
    except (TypeError, ValueError) as error:
        raise IndexCorruptError(f"its index has invalid rows: {error}") from error


def _from_sqlite(error: sqlite3.Error) -> IndexFailedError:
    # The low byte is the kind (https://sqlite.org/rescode.html); ERROR: a table is missing.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_NOTADB) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        return IndexCorruptError(f"its index is damaged: {error}")
    if code == sqlite3.SQLITE_FULL:
        return IndexFullError("its disk is full")
    return IndexFailedError(f"its index does not work: {error}")


class BlockIndex(diskcache.Cache):  # type: ignore[misc]
    """The table of one directory.

    Keys are `CONTENT:NUMBER`, by the digest of the content. All methods raise `IndexFailedError`.

    Args:
        directory: which exists.
    """

    @_asks
    def __init__(self, directory: Path) -> None:
        super().__init__(
            str(directory),
            timeout=LOCK_TIMEOUT_S,
            disk=_NoValues,
            eviction_policy="least-recently-used",  # so that the table is indexed by access_time
            cull_limit=0,
            statistics=0,
            # SQLite's own cache and memory map would count as the worker's memory.
            sqlite_cache_size=256,
            sqlite_mmap_size=0,
        )
        self._file = Path(directory, INDEX_NAME)
        self._inode = self._file.stat().st_ino

    @property
    def is_current(self) -> bool:
        """Whether the file that was opened is still the one in the directory."""
        try:
            return self._file.stat().st_ino == self._inode
        except OSError:
            return False

    @_asks
    def filename(self, key: str) -> str | None:
        """The file of a block that is ready, relative to the directory."""
        row = self._sql(
            "SELECT filename FROM Cache WHERE key = ? AND raw = 1 AND mode = ?", (key, READY)
        ).fetchone()
        return row[0] if row else None

    @_asks
    def file_and_sums(self, key: str) -> tuple[str, bytes] | None:
        """The file of a block that is ready, and its running sums; empty if there are none."""
        row = self._sql(
            "SELECT filename, value FROM Cache WHERE key = ? AND raw = 1 AND mode = ?", (key, READY)
        ).fetchone()
        return (row[0], row[1] if isinstance(row[1], bytes) else b"") if row else None

    @_asks
    def numbers(self, content: str) -> list[int]:
        """Which blocks of a content are ready."""
        rows = self._sql(
            "SELECT key FROM Cache WHERE key > ? AND key < ? AND raw = 1 AND mode = ?",
            (f"{content}:", f"{content};", READY),
        )
        return sorted(int(key.rpartition(":")[2]) for (key,) in rows)

    @_asks
    def used_bytes(self) -> int:
        """The size of all blocks in bytes, including those being written."""
        return self._used()

    def _used(self) -> int:
        return int(self._sql("SELECT value FROM Settings WHERE key = 'size'").fetchone()[0])

    @_asks
    def reserve(
        self, entries: Sequence[Entry], now_s: float, allowed_bytes: int, before_s: float
    ) -> tuple[list[Entered], list[str]]:
        """Enter blocks before they are written, as far as there is room or it can be made.

        Args:
            allowed_bytes: the maximum size of all blocks.
            before_s: blocks that were used at this time or later are not evicted for them.

        Returns:
            The result for each block, and the files of evicted blocks, to be removed.
        """
        entered, left = [], []
        with self._transact():
            for entry in entries:
                state, files = self._reserve(entry, now_s, allowed_bytes, before_s)
                entered.append(state)
                left += files
        return entered, left

    def _reserve(
        self, entry: Entry, now_s: float, allowed_bytes: int, before_s: float
    ) -> tuple[Entered, list[str]]:
        key = entry.key
        known = self._sql(
            "SELECT filename, mode FROM Cache WHERE key = ? AND raw = 1", (key,)
        ).fetchone()
        if known and known[1] == READY:
            return Entered.KNOWN, []
        missing = self._used() + entry.size_bytes - allowed_bytes
        victims = self._victims(missing, now_s, before_s) if missing > 0 else []
        if victims is None:
            return Entered.DECLINED, []
        left = self._forget(victims)
        if known:
            self._sql("DELETE FROM Cache WHERE key = ? AND raw = 1", (key,))
            left.append(known[0])
        self._row_insert(
            key, 1, now_s, (None, entry.tag, entry.size_bytes, PENDING, entry.filename, None)
        )
        return Entered.NEW, left

    @_asks
    def complete(self, entries: Sequence[tuple[Entry, bytes | None]]) -> list[bool]:
        """Mark blocks as written; False for those whose rows are gone meanwhile.

        Args:
            entries: each with the running sums of its block, if they are known.
        """
        with self._transact() as (sql, _):
            return [
                sql(
                    "UPDATE Cache SET mode = ?, value = ?"
                    " WHERE key = ? AND raw = 1 AND filename = ?",
                    (READY, sums, entry.key, entry.filename),
                ).rowcount
                == 1
                for entry, sums in entries
            ]

    @_asks
    def discard(self, key: str, filename: str, *, is_pending: bool | None = None) -> bool:
        """Remove a block, if that is still its file; returns whether it was.

        Args:
            is_pending: whether it must be pending, or ready; None: it may be either.
        """
        one, other = PENDING if is_pending is not False else READY, PENDING if is_pending else READY
        with self._transact() as (sql, _):
            done = sql(
                "DELETE FROM Cache WHERE key = ? AND raw = 1 AND filename = ? AND mode IN (?, ?)",
                (key, filename, one, other),
            )
            return bool(done.rowcount)

    @_asks
    def forget(self, content: str) -> list[str]:
        """Remove all ready blocks of a content; returns the files to delete."""
        with self._transact() as (sql, _):
            victims = sql(
                "SELECT rowid, filename FROM Cache"
                " WHERE key > ? AND key < ? AND raw = 1 AND mode = ?",
                (f"{content}:", f"{content};", READY),
            ).fetchall()
            return self._forget(victims)

    @_asks
    def forget_older(self, used_before_s: float) -> list[str]:
        """Remove blocks that were last used before a time; returns the files to delete."""
        with self._transact() as (sql, _):
            victims = sql(
                "SELECT rowid, filename FROM Cache WHERE access_time < ? AND mode = ?",
                (used_before_s, READY),
            ).fetchall()
            return self._forget(victims)

    @_asks
    def shrink(self, excess_bytes: int, now_s: float) -> list[str]:
        """Remove blocks of at least this size in total; returns the files to delete."""
        with self._transact():
            victims = self._victims(excess_bytes, now_s, float("inf"), all_or_nothing=False)
            return self._forget(victims or [])

    @_asks
    def touch(self, uses: Iterable[tuple[float, str]]) -> None:
        """Record uses of blocks, past or future: pairs of time and key."""
        with self._transact():
            self._con.executemany(
                "UPDATE Cache SET access_time = ? WHERE key = ? AND raw = 1", uses
            )

    @_asks
    def add_counts(self, hits: int, misses: int) -> None:
        """Add to the numbers of hits and misses."""
        with self._transact() as (sql, _):
            for name, more in (("hits", hits), ("misses", misses)):
                sql("UPDATE Settings SET value = value + ? WHERE key = ?", (more, name))

    @_asks
    def hits_and_misses(self) -> tuple[int, int]:
        """The numbers of hits and misses since the index was made."""
        rows = dict(self._sql("SELECT key, value FROM Settings WHERE key IN ('hits', 'misses')"))
        return rows["hits"], rows["misses"]

    @_asks
    def rows(self) -> list[Row]:
        """All blocks."""
        return [
            Row(key, filename, size, used, mode == PENDING)
            for key, filename, size, used, mode in self._sql(
                "SELECT key, filename, size, access_time, mode FROM Cache"
            )
        ]

    @_asks
    def contents(self) -> list[Stored]:
        """The contents with ready blocks."""
        rows = self._sql(
            "SELECT tag, COUNT(*), MAX(CAST(substr(key, instr(key, ':') + 1) AS INTEGER)),"
            " MIN(store_time), MAX(access_time) FROM Cache WHERE mode = ? GROUP BY tag",
            (READY,),
        )
        return [Stored(*row) for row in rows]

    def _victims(
        self, missing_bytes: int, now_s: float, before_s: float, *, all_or_nothing: bool = True
    ) -> list[tuple[int, str]] | None:
        """The least recently used blocks that free this much; None if there are not enough.

        A block with a use in the future was used before the clock was set back.
        """
        victims = []
        for rowid, filename, size in self._sql(
            "SELECT rowid, filename, size FROM Cache"
            " WHERE mode = ? AND (access_time < ? OR access_time > ?) ORDER BY access_time",
            (READY, before_s, now_s + 60),
        ):
            victims.append((rowid, filename))
            missing_bytes -= size
            if missing_bytes <= 0:
                return victims
        return None if all_or_nothing else victims

    def _forget(self, victims: list[tuple[int, str]]) -> list[str]:
        self._con.executemany("DELETE FROM Cache WHERE rowid = ?", [(v[0],) for v in victims])
        return [filename for _, filename in victims]


def remove_index(directory: Path) -> None:
    """Delete the database, so that a new one can be made. Raises OSError."""
    for companion in _COMPANIONS:
        Path(directory, INDEX_NAME + companion).unlink(missing_ok=True)
