"""A process in which botocore finds out what a worker needs to know about its source.

Loading botocore and making a client takes as long as loading everything else that a worker needs.
So both happen in parallel, and the worker itself loads botocore only if it has to list, or when its
keys expire (`lazyfs/store/s3_source.py`).

The probe is forked from the worker, and has its standard error. It answers with JSON, `found`, or
`error` and `kind`, and ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from lazyfs import errors
from lazyfs.errors import LazyfsError, MountError
from lazyfs.options.mount_options import MountOptions
from lazyfs.store.credentials import Credentials
from lazyfs.store.protocol import Source
from lazyfs.store.resolved_source import ResolvedSource
from lazyfs.store.url import SourceUrl

_ANSWER = 3
# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# The name that ps(1) shows, at most 15 letters.
NAME = "lazyfs-probe"


class SourceProbe:
    """Start the process. No other thread may run at that time.

    Args:
        source: the class of the source's store.
        url, options, credentials: as for its `resolve`.
        region: the bucket's region, if it is already known.
    """

    def __init__(
        self,
        source: type[Source],
        url: SourceUrl,
        options: MountOptions,
        credentials: Credentials | None,
        region: str | None,
    ) -> None:
        answer, theirs = os.pipe()
        worker = os.getpid()
        self._ending = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            _be_probe(theirs, worker, lambda: source.resolve(url, options, credentials, region))
        self._ended = False
        self._answer = answer
        os.close(theirs)

    def wait(self) -> ResolvedSource | None:
        """Wait for the result; None if the process ended without an answer.

        Raises:
            LazyfsError: like `resolve`; or `end` was called.
        """
        with open(self._answer, "rb") as pipe:
            answer = pipe.read()
        if not self.end():
            raise MountError("the worker ends")
        try:
            said: dict[str, Any] = json.loads(answer)
        except ValueError:
            return None
        if "error" in said:
            raise getattr(errors, said["kind"])(said["error"])
        return ResolvedSource.of_json(said["found"])

    def end(self) -> bool:
        """End the process, which is not needed any more; False if it was ended before."""
        with self._ending:
            if self._ended:
                return False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._ended = True
            return True


def _be_probe(answer: int, worker: int, find: Callable[[], ResolvedSource]) -> NoReturn:
    code = 1
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NAME, NAME.encode())
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:  # which ended before that
            os._exit(code)
        # Whatever else the worker holds must end with the worker.
        answer = fcntl.fcntl(answer, fcntl.F_DUPFD, _ANSWER + 1)
        os.dup2(answer, _ANSWER, inheritable=False)
        os.closerange(_ANSWER + 1, os.sysconf("SC_OPEN_MAX"))
        with open(_ANSWER, "w") as output:
            json.dump(_found(find), output)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        logging.shutdown()
        os._exit(code)


def _found(find: Callable[[], ResolvedSource]) -> dict[str, Any]:
    try:
        return {"found": find().as_json()}
    except LazyfsError as error:
        return {"error": str(error), "kind": type(error).__name__}
