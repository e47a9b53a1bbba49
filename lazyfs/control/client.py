"""Asks a running worker. Only the standard library; for callers that block."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from lazyfs.errors import LazyfsError

TIMEOUT_S = 10.0


class ControlError(LazyfsError):
    """The worker did not answer, or refused."""


class ControlClient:
    """One worker's control socket.

    Args:
        path: of the socket.
        timeout_s: how long to wait for an answer.
    """

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def get(self, what: str) -> Any:
        """The answer to `GET what`, from JSON. Raises ControlError."""
        return self._ask("GET", what, None)

    def put(self, what: str, body: Any) -> Any:
        """The answer to `PUT what` with JSON. Raises ControlError."""
        return self._ask("PUT", what, body)

    def text(self, what: str) -> str:
        """The answer to `GET what`, as it is. Raises ControlError."""
        return self._exchange("GET", what, None).decode()

    def _ask(self, method: str, what: str, body: Any) -> Any:
        return json.loads(self._exchange(method, what, body) or "null")

    def _exchange(self, method: str, what: str, body: Any) -> bytes:
        connection = _UnixConnection(self._path, self._timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, what, content)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ControlError(f"{self._path}: the daemon does not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ControlError(_reason(answer, response.status))
        return answer


def _reason(answer: bytes, status: int) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered with status {status}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("lazyfs", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
