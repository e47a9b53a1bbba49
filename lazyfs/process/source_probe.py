"""A process in which botocore finds out what a worker needs to know about its source.

Loading botocore and making a client takes as long as loading everything else that a worker needs.
So both happen in parallel, and the worker itself loads botocore only if it has to list, or when its
keys expire (`lazyfs/store/s3_source.py`).

The probe is forked from the worker. It gets one request: the spec of the mount, in a message whose
text is the region of the bucket, if that is known. It answers with JSON, `found`, or `error` and
`kind`, and ends. Its other output goes to the worker's log.
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
# The name that ps(1) shows, at most 15 letters.
NAME = "lazyfs-probe"


class SourceProbe:
    """Start the process, which loads botocore at once. No other thread may run at that time."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        worker = os.getpid()
        self._ending = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            _be_probe(theirs, worker)
        self._ended = False
        theirs.close()

    def ask(self, spec: int, region: str | None) -> ResolvedSource | None:
        """Wait for the result; None if the process ended without an answer.

        Args:
            spec: a descriptor of the mount's spec.
            region: the bucket's region, if it is already known.

        Raises:
            LazyfsError: like `resolve`.
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
        """End the process, which is not needed any more; a waiting `ask` returns None."""
        with self._ending:
            if not self._ended:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._ended = True


def _be_probe(connection: socket.socket, worker: int) -> NoReturn:
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
