"""Starts a worker before `lazyfs mount` has read its options.

Loading its modules takes a worker longer than anything else, so it does that while the command
reads its options. The command first forks the process that stays in the background, and this
process starts the worker. When the command tells it what to mount, it becomes the mount's
supervisor; when the command ends without that, it ends too, and the worker with it. In the
foreground the command does all of this itself.

This module uses little of the standard library and nothing else: the fork comes first.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lazyfs.process.mount_spec import MountSpec

_IN_FRONT = {"-f", "--foreground"}
_NOT_AT_ALL = {"-h", "--help"}


def begin(arguments: Sequence[str]) -> Background | EarlyWorker | None:
    """The first words of a `lazyfs` command line; None if it does not look like a mount."""
    if arguments[:1] == ["mount"] and not _NOT_AT_ALL & set(arguments):
        for source, mountpoint in itertools.pairwise(arguments):
            if source.startswith("s3://") and not mountpoint.startswith("-"):
                kind = EarlyWorker if _IN_FRONT & set(arguments) else Background
                return kind(os.path.realpath(mountpoint), arguments)
    return None


class EarlyWorker:
    """A worker that is loading and waits for this process to become its supervisor.

    Args:
        mountpoint: an absolute path.
        arguments: of the command.
    """

    def __init__(self, mountpoint: str, arguments: Sequence[str]) -> None:
        from lazyfs.process.privileges import worker_user
        from lazyfs.process.worker_files import early_rights
        from lazyfs.process.worker_process import start_worker

        self.mountpoint = mountpoint
        self._keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            user = worker_user(early_rights(arguments, os.environ))
            self._worker = start_worker(mountpoint, theirs, user)
        self._supervises = False

    def supervise(self, spec: MountSpec, report_fd: int | None) -> int:
        """Have it mount, and supervise the mount; returns the exit code."""
        from lazyfs.process import standalone

        self._supervises = True
        return standalone.main(spec, report_fd, (self._worker, self._keeper))

    def end(self) -> None:
        """End it, unless it was supervised."""
        if not self._supervises:
            self._worker.process.kill()
            self._worker.process.wait()


class Background:
    """A process that waits for what to mount. No other thread may run when it is forked.

    Args:
        mountpoint: an absolute path.
        arguments: of the command.
    """

    def __init__(self, mountpoint: str, arguments: Sequence[str]) -> None:
        self.mountpoint = mountpoint
        # It continues by itself, or has ended.
        self._left = False
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            _wait_in_background(mountpoint, arguments, theirs)
        theirs.close()

    def mount(self, spec: MountSpec, log_fd: int, timeout_s: float) -> dict[str, Any]:
        """Have it mount, and wait for its report; empty if none comes in time.

        Raises:
            BrokenPipeError: it has ended.
        """
        from lazyfs.process.worker_process import read_report

        ours, theirs = os.pipe()
        passed = [spec.to_descriptor(), log_fd, theirs]
        try:
            socket.send_fds(self._connection, [b"mount"], passed)
            self._left = True
        finally:
            os.close(passed[0])
            os.close(theirs)
        return read_report(ours, timeout_s) or {}

    def end(self) -> None:
        """End it, unless it was told to mount."""
        self._connection.close()
        if not self._left:
            os.waitpid(self._pid, 0)
            self._left = True

    def stop(self) -> None:
        """End it, even if it was told to mount."""
        self._left = False
        os.kill(self._pid, signal.SIGTERM)
        self.end()


def _wait_in_background(
    mountpoint: str, arguments: Sequence[str], connection: socket.socket
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        # Only the outputs of the command stay open, until there is a log. If those
        # are closed, other descriptors may have their numbers.
        told = fcntl.fcntl(connection.detach(), fcntl.F_DUPFD, 4)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(told, 3, inheritable=False)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        code = _supervise(mountpoint, arguments, socket.socket(fileno=3))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _supervise(mountpoint: str, arguments: Sequence[str], connection: socket.socket) -> int:
    begun = EarlyWorker(mountpoint, arguments)
    told, descriptors, _, _ = socket.recv_fds(connection, 16, 3, socket.MSG_CMSG_CLOEXEC)
    if not told:
        begun.end()
        return 0
    # Only now, because before this the worker and the command need the processors.
    from lazyfs.process.mount_spec import MountSpec

    spec_fd, log_fd, report_fd = descriptors
    for output in (1, 2):
        os.dup2(log_fd, output)
    os.close(log_fd)
    spec = MountSpec.from_descriptor(spec_fd)
    os.close(spec_fd)
    return begun.supervise(spec, report_fd)
