"""Makes the kernel look up the files of a plan, so that blocks can be put into its page cache.

A helper process does that: the worker must not walk its own mount, or it would wait for itself when
it is killed.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from lazyfs.faults import contained
from lazyfs.helper_process import run_helper
from lazyfs.objects import File

log = logging.getLogger(__name__)

_LOOK_UP = (
    "import os, sys\n"
    "for directory in sys.argv[1:]:\n"
    "    for name in os.listdir(directory): os.lstat(os.path.join(directory, name))\n"
)
# Directories of a plan, so that they fit on a command line (execve(2)).
MOST_DIRECTORIES = 1000


class Walker:
    """Looks up each directory of a plan once.

    Args:
        path: returns the path of a file below the mountpoint.
        nursery: runs the helper processes.
    """

    def __init__(
        self, mountpoint: Path, path: Callable[[File], str], nursery: trio.Nursery
    ) -> None:
        self._mountpoint = mountpoint
        self._path = path
        self._nursery = nursery
        self._seen: set[int] = set()

    def look_up(self, files: Sequence[File]) -> None:
        """Have the kernel look up these files soon. Never blocks."""
        new = {file.parent: file for file in files if file.parent not in self._seen}
        if new:
            self._seen.update(new)
            first = list(new.values())[:MOST_DIRECTORIES]
            self._nursery.start_soon(
                contained, "looking up files", _look_at,
                [str((self._mountpoint / self._path(file)).parent) for file in first],
            )  # fmt: skip


async def _look_at(directories: Sequence[str]) -> None:
    try:
        with contextlib.suppress(subprocess.CalledProcessError):  # the mount has ended
            await run_helper([sys.executable, "-I", "-S", "-c", _LOOK_UP, *directories])
    except OSError as error:
        log.warning(
            "files cannot be looked up ahead, so blocks are pushed after readers open them: %s",
            error,
        )
