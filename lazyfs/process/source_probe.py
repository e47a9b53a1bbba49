"""A process that has botocore find out what a worker needs to know of its source, and ends.

botocore takes as long to load, and to make a client, as everything else that a worker loads. So the
two are done side by side, and the worker loads botocore itself only if it has to list, or when its
keys run out (`lazyfs/store/s3_source.py`).

The scout is forked from the worker. It is asked once, with the spec of the mount, by a message
whose text is the region of the bucket, if it is known, and answers with JSON: `found`, or `error`
and `kind`. What it says otherwise goes where the worker's log goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import threading
from typing import Any, NoReturn

from lazyfs import errors, log
from lazyfs.errors import LazyfsError
from lazyfs.options.mount_options import MountOptions
from lazyfs.process.mount_spec import MountSpec
from lazyfs.process.privileges import limit_memory
from lazyfs.store.resolved_source import ResolvedSource
from lazyfs.store.s3_source import resolve
from lazyfs.store.url import SourceUrl

STDERR = 2
PIECE = 1 << 16
_UNKNOWN = b"-"
# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# What ps(1) shows in the place of the worker's name, at most 15 letters.
NAME = "lazyfs-scout"


class SourceProbe:
    """The process, which loads botocore at once. No other thread may run when it is made."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        worker = os.getpid()
        self._ending = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            _be_scout(theirs, worker)
        self._ended = False
        theirs.close()

    def ask(self, spec: int, region: str | None) -> ResolvedSource | None:
        """Wait for what it finds; None if it ended without an answer.

        Args:
            spec: a descriptor of the mount's spec.
            region: of the bucket, if it is known from before.

        Raises:
            LazyfsError: as of `resolve`.
        """
        answer = bytearray()
        with contextlib.suppress(ConnectionError):
            socket.send_fds(
                self._connection, [region.encode() if region else _UNKNOWN], [spec, STDERR]
            )
            while piece := self._connection.recv(PIECE):
                answer += piece
        self.end()
        try:
            said: dict[str, Any] = json.loads(answer)
        except ValueError:
            return None
        if "error" in said:
            raise getattr(errors, said["kind"])(said["error"])
        return ResolvedSource.of_json(said["found"])

    def end(self) -> None:
        """It is not needed any more; whoever waits for its answer gets none."""
        with self._ending:
            if not self._ended:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._ended = True


def _be_scout(connection: socket.socket, worker: int) -> NoReturn:
    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NAME, NAME.encode())
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:  # which ended before that
            os._exit(code)
        # Whatever else the worker holds must end with the worker.
        told = fcntl.fcntl(connection.detach(), fcntl.F_DUPFD, 4)
        os.dup2(told, 3, inheritable=False)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        _find(socket.socket(fileno=3))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _find(connection: socket.socket) -> None:
    import lazyfs.store.boto.resolver  # noqa: F401 - before it is known what is to be found

    text, descriptors, _, _ = socket.recv_fds(connection, PIECE, 2, socket.MSG_CMSG_CLOEXEC)
    if not text:
        return
    spec_fd, log_fd = descriptors
    for output in (1, 2):
        os.dup2(log_fd, output)
    spec = MountSpec.from_descriptor(spec_fd)
    try:
        options = MountOptions.parse(("--{name}", spec.options))
        limit_memory(options.memory_limit)
        log.configure(
            options.log_level, options.log_format, mountpoint=spec.mountpoint, volume=spec.volume
        )
        region = None if text == _UNKNOWN else text.decode()
        found = resolve(SourceUrl.parse(spec.source), options, spec.credentials, region)
        answer: dict[str, Any] = {"found": found.as_json()}
    except LazyfsError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    connection.sendall(json.dumps(answer).encode())
