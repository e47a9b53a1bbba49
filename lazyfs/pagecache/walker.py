"""Makes the kernel look up the files of a plan, so that blocks can be put into its page cache.

A helper process does that (`LOOK_UP` in `process/mount_helpers.py`): the worker must not walk its
own mount, or it would wait for itself when it is killed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence

import trio

from lazyfs.faults import contained
from lazyfs.helper_process import HelperProcesses
from lazyfs.listed_object import File

log = logging.getLogger(__name__)

# Directories of a plan that are looked up at once.
MOST_DIRECTORIES = 1000


class Walker:
    """Looks up each directory of a plan once.

    Args:
        path: returns the path of a file below the mountpoint.
        helpers: starts the helper processes.
        nursery: waits for them.
    """

    def __init__(
        self, path: Callable[[File], str], helpers: HelperProcesses, nursery: trio.Nursery
    ) -> None:
        self._path = path
        self._helpers = helpers
        self._nursery = nursery
        self._seen: set[int] = set()

    def look_up(self, files: Sequence[File]) -> None:
        """Have the kernel look up these files soon. Never blocks."""
        new = {file.parent: file for file in files if file.parent not in self._seen}
        if new:
            self._seen.update(new)
            first = list(new.values())[:MOST_DIRECTORIES]
            directories = {self._path(file).rpartition("/")[0] for file in first}
            self._nursery.start_soon(contained, "looking up files", self._look_at, directories)

    async def _look_at(self, directories: Iterable[str]) -> None:
        try:
            await self._helpers.run("look_up", b"\0".join(map(os.fsencode, directories)))
        except OSError as error:
            log.warning(
                "files cannot be looked up ahead, so blocks are pushed after readers open them: %s",
                error,
            )
