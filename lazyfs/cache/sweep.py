"""What is left over in a cache directory, and removed: files without a row, rows without a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container

from lazyfs.cache.block_files import BlockFiles
from lazyfs.cache.claims import Claims
from lazyfs.cache.index import BlockIndex

# How often a directory is swept.
SWEEP_S = 3600.0


def is_due(descriptor: int) -> bool:
    """Whether the last sweep is long ago, by the time of a file; a time in the future is."""
    return not 0 <= time.time() - os.fstat(descriptor).st_mtime < SWEEP_S


def sweep(
    index: BlockIndex,
    files: BlockFiles,
    claims: Claims | None,
    writing: Container[str],
    adopt: Callable[[str], bool] | None,
) -> None:
    """Remove files without a row and rows without a file.

    Args:
        claims: of the directory. What another process writes is claimed, if that was possible; if
            not, it may be removed, and the block is fetched again.
        writing: the files that this process is writing.
        adopt: makes the row of a file again, or returns false; None: the index was not lost.
    """
    names = files.names()
    # Rows after files: a file that was listed had its row before it existed.
    rows = {row.filename: row for row in index.rows()}
    there = set(names)
    # Before files are adopted, which takes long: meanwhile blocks are written to their end.
    for row in rows.values():
        if row.is_pending:
            is_left = row.filename not in writing and not (claims and claims.is_taken(row.key))
        else:
            is_left = not (row.filename in there or files.path(row.filename).exists())
        # It may have become complete since the rows were listed.
        if is_left and index.discard(row.key, row.filename, is_pending=row.is_pending):
            files.remove([row.filename])
    for filename in names:
        if filename in rows or filename in writing:
            continue
        if not (adopt and adopt(filename)):
            files.remove([filename])
