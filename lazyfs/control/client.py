"""A blocking client of a worker's control socket. Uses only the standard library.

A worker may have been taken over, and the plugin asks the workers of all tenants. So the size of an
answer and the time for it are limited.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any

from lazyfs.errors import LazyfsError

TIMEOUT_S = 10.0
# The longest answer, in bytes: the names of all files of a mount may be asked for.
MOST_BYTES = 256 << 20


class ControlError(LazyfsError):
    """The worker did not answer, or refused.

    Attributes:
        exit_code: for the command line; 2 if the request is not allowed.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ControlClient:
    """One worker's control socket.

    Args:
        path: the socket.
        timeout_s: how long to wait for the whole answer.
        most_bytes: the longest answer that is read.
    """

    def __init__(
        self, path: Path, timeout_s: float = TIMEOUT_S, most_bytes: int = MOST_BYTES
    ) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._most_bytes = most_bytes

    def get(self, what: str) -> Any:
        """The answer to `GET what`, from JSON. Raises ControlError."""
        return self._ask("GET", what, None)

    def put(self, what: str, body: Any) -> Any:
        """The answer to `PUT what` with JSON. Raises ControlError."""
        return self._ask("PUT", what, body)

    def text(self, what: str) -> str:
        """The body of the answer to `GET what`. Raises ControlError."""
        return self._exchange("GET", what, None).decode()

    def _ask(self, method: str, what: str, body: Any) -> Any:
        try:
            return json.loads(self._exchange(method, what, body) or "null")
        except (ValueError, RecursionError) as error:
            raise ControlError(f"{self._path}: the daemon's answer is not JSON") from error

    def _exchange(self, method: str, what: str, body: Any) -> bytes:
        connection = _UnixConnection(self._path, self._timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, what, content)
            response = connection.getresponse()
            answer = response.read(self._most_bytes + 1)
            if len(answer) > self._most_bytes:
                raise ControlError(f"{self._path}: the daemon's answer is too long")
            if response.length:  # the library takes an answer that was cut off for a whole one
                raise ControlError(f"{self._path}: the daemon ended while it answered")
        except (OSError, http.client.HTTPException) as error:
            raise ControlError(f"{self._path}: the daemon does not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal(answer, response.status)
        return answer


def _refusal(answer: bytes, status: int) -> ControlError:
    try:
        told = json.loads(answer)
        return ControlError(str(told["error"]), int(told.get("exit_code", 1)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ControlError(f"the daemon answered with status {status}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("lazyfs")
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = _TimedSocket(self._timeout_s)
        self.sock.connect(str(self._path))


class _TimedSocket(socket.socket):
    """A unix socket whose timeout is for all that is received together."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(socket.AF_UNIX)
        self.settimeout(timeout_s)
        self._until_s = time.monotonic() + timeout_s

    def recv_into(self, *arguments: Any) -> int:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left_s)
        return super().recv_into(*arguments)
