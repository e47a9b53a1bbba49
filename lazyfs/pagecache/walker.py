"""Lets the kernel look up the files of a plan, so that blocks can be put into its page cache.

A process of its own does that: one that serves a mount must not walk it, or the two wait for each
other when it is killed.
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
# Of a plan, so that its directories fit on a command line (execve(2)).
MOST_DIRECTORIES = 1000


class Walker:
    """Looks at each directory of a plan once.

    Args:
        path: of a file, below the mountpoint.
        nursery: of those who look.
    """

    def __init__(
        self, mountpoint: Path, path: Callable[[File], str], nursery: trio.Nursery
    ) -> None:
        self._mountpoint = mountpoint
        self._path = path
        self._nursery = nursery
        self._seen: set[int] = set()

    def look_up(self, files: Sequence[File]) -> None:
        """Let the kernel know these files soon. Never blocks."""
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
        log.warning("what is fetched ahead waits for readers to open it: no process: %s", error)
