"""Helper processes that use a mount. Its worker must not: it would wait for itself.

Only the user of a mount may see its files and ask which of their pages are in memory (mincore(2)).
A worker of root is another user, so the supervisor starts the helpers, as the owner of the files
and without any capability. The worker sends the name of a helper and the ends of two pipes: what
the helper reads, and where it prints.

Uses only the standard library.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lazyfs.process.privileges import WorkerUser, start

log = logging.getLogger(__name__)

# The helpers, as arguments of Python: each one also gets the mountpoint. `walker.py` explains the
# first one. A worker that was taken over can answer the kernel with links to anywhere, so they are
# not followed.
LOOK_UP = (
    "import os, sys\n"
    "step = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW\n"
    "for directory in sys.stdin.buffer.read().split(b'\\0'):\n"
    "    here = os.open(sys.argv[1], step)\n"
    "    for part in directory.split(b'/'):\n"
    "        if part == b'..': sys.exit('leads out of the mount')\n"
    "        if part:\n"
    "            below = os.open(part, step, dir_fd=here)\n"
    "            os.close(here)\n"
    "            here = below\n"
    "    inside = os.open('.', os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)\n"
    "    for name in os.listdir(inside): os.lstat(name, dir_fd=inside)\n"
    "    os.close(inside)\n"
    "    os.close(here)\n"
)
_PROGRAMS = {
    "look_up": ["-I", "-S", "-c", LOOK_UP],
    "dropped": ["-P", "-m", "lazyfs.pagecache.mincore"],
    "direct": ["-P", "-m", "lazyfs.pagecache.direct_probe"],
}
# The most helpers of one mount. A worker asks for one of each; helpers that wait for a dead worker
# count too.
MOST_HELPERS = 8
_LONGEST_MESSAGE = 1024


class MountHelpers:
    """Starts the helpers of one mount.

    Args:
        mountpoint: the mount that they read.
        owner: the owner of the files.
        is_there: whether the mount is still at its mountpoint.
    """

    def __init__(self, mountpoint: Path, owner: int, is_there: Callable[[], bool]) -> None:
        self._mountpoint = mountpoint
        self._is_there = is_there
        is_other = os.geteuid() == 0 and owner != 0
        self._user = WorkerUser(owner if is_other else None, None, reads_all_files=False)
        self._running: list[subprocess.Popen[bytes]] = []

    def serve(self, worker: socket.socket) -> None:
        """Start the helpers that a worker requests, until it ends."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    worker, _LONGEST_MESSAGE, 2, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                return
            try:
                if not data:
                    return
                self._start(data, descriptors)
            finally:
                # Without a helper, the worker reads the end of an empty pipe.
                for descriptor in descriptors:
                    os.close(descriptor)

    def _start(self, data: bytes, descriptors: list[int]) -> None:
        self._running = [each for each in self._running if each.poll() is None]
        try:
            arguments = _PROGRAMS[json.loads(data)["help"]]
            printed_by, read_by = descriptors
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if len(self._running) >= MOST_HELPERS or not self._is_there():
            return
        command = [sys.executable, *arguments, str(self._mountpoint)]
        outputs = (printed_by, read_by, subprocess.DEVNULL)
        try:
            self._running.append(start(command, self._user, outputs=outputs))
        except (OSError, RuntimeError) as error:
            log.warning(
                "files cannot be looked up ahead, so blocks are pushed after readers open them: %s",
                error,
            )
