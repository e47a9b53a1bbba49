"""The cache of a fleet: a proxy in front of S3 that many nodes share (`--fleet-cache`).

It gets the same requests for ranges of objects that S3 would get, with unchanged signature and
`Host`. So it needs no keys and can let S3 authorise each reader. Its answers are checked like
answers of S3. If anything is wrong with the cache, S3 can be asked instead.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from enum import StrEnum
from http.client import HTTPConnection
from typing import TypeVar

from lazyfs.store import ranges
from lazyfs.store.addresses import BadAddressError
from lazyfs.store.cancel import Cancel
from lazyfs.store.http import Transport
from lazyfs.store.http_answer import Answer, Response
from lazyfs.store.refusals import MOST_TEXT, Refusal

T = TypeVar("T")

# The cache is on this machine, or next to it.
CONNECT_TIMEOUT_S = 2.0
# Asks shelves to get the range from S3 again, in the place of what they have (`fleet/nginx.py`).
REFRESH = {"X-Lazyfs-Refresh": "1"}
# Another node may still be fetching the range over a slow link before the first byte arrives here.
SILENCE_TIMEOUT_S = 60.0


class Trouble(StrEnum):
    """What was wrong with an answer of the cache, as metrics name it."""

    AWAY = "away"  # no connection could be made
    CUT_OFF = "cut_off"  # the answer ended too early
    SILENT = "silent"  # no byte came for `SILENCE_TIMEOUT_S`
    FAILED = "failed"  # 5xx of the cache itself
    S3_TROUBLE = "s3_trouble"  # 5xx of S3, passed through
    REFUSED = "refused"  # 4xx
    WRONG = "wrong"  # another range, another version, another size, or no range at all


class FleetCacheError(Exception):
    """The cache did not deliver the range; the message says why.

    Attributes:
        refusal: its answer, if there was one.
    """

    def __init__(self, trouble: Trouble, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(message)
        self.trouble = trouble
        self.refusal = refusal

    @property
    def is_certain(self) -> bool:
        """Whether the cache itself has certainly failed, whatever S3 would answer."""
        return self.trouble in (Trouble.AWAY, Trouble.CUT_OFF)


class _AwayError(Exception):
    """No connection could be made."""


class _UnixConnection(HTTPConnection):
    """A connection over a Unix socket. `host` is its path."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        self.sock.connect(self.host)
        self.sock.settimeout(SILENCE_TIMEOUT_S)


class _Connections(Transport):
    def _connect(self) -> HTTPConnection:
        try:
            return super()._connect()
        except OSError as error:
            raise _AwayError(error.strerror or str(error)) from error


class _UnixConnections(Transport):
    """Args: path: the path of the socket."""

    def __init__(self, path: str) -> None:
        super().__init__("http://localhost", asks_silent_again=False)
        self._path = path

    def _connect(self) -> HTTPConnection:
        connection = _UnixConnection(self._path)
        connection.response_class = Response
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise _AwayError(error.strerror or str(error)) from error
        return connection


class FleetCache:
    """Connections to the cache of a fleet. All calls block.

    Args:
        url: `http://HOST:PORT`, or `unix:/PATH`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connections: Transport
        if url.startswith("unix:"):
            self._connections = _UnixConnections(url.removeprefix("unix:"))
        else:
            timeouts_s = CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S
            self._connections = _Connections(url, timeouts_s=timeouts_s, asks_silent_again=False)

    def connect(self) -> None:
        """Check that a connection can be made. Raises FleetCacheError."""
        try:
            self._connections.connect_ahead()
        except _AwayError as error:
            raise FleetCacheError(Trouble.AWAY, f"no connection ({error})") from error

    def ask(
        self,
        target: str,
        headers: Mapping[str, str],
        handle: Callable[[Answer], T],
        cancel: Cancel,
    ) -> T:
        """Request a range of an object.

        Args:
            headers: as for S3, including `Host`.
            handle: processes a 2xx answer; raises as `ranges.check` does.

        Raises:
            CancelledError: by `cancel`.
            FleetCacheError: it did not deliver the range.
        """

        def take(answer: Answer) -> T:
            if answer.status >= 300 or answer.status < 200:
                raise _refusal(answer)
            return handle(answer)

        try:
            return self._connections.exchange("GET", target, headers, take, cancel)
        except _AwayError as error:
            raise FleetCacheError(Trouble.AWAY, f"no connection ({error})") from error
        except (ranges.ChangedError, ranges.OtherRangeError, ranges.IgnoresRangeError) as error:
            raise FleetCacheError(Trouble.WRONG, str(error)) from error
        except BadAddressError as error:
            raise FleetCacheError(Trouble.AWAY, str(error)) from error
        except TimeoutError as error:
            silence = f"silent for {SILENCE_TIMEOUT_S:g} s"
            raise FleetCacheError(Trouble.SILENT, silence) from error
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            raise FleetCacheError(Trouble.CUT_OFF, f"cut off ({words})") from error

    def close_idle(self) -> None:
        """Close connections that have been idle for a while."""
        self._connections.close_idle()


def _refusal(answer: Answer) -> FleetCacheError:
    refusal = Refusal.of(answer.status, answer.headers, answer.body.read_all(MOST_TEXT))
    said = f"answered {answer.status} {refusal.code}".strip()
    if answer.status < 500:
        trouble = Trouble.REFUSED
    else:
        trouble = Trouble.S3_TROUBLE if refusal.code else Trouble.FAILED
    return FleetCacheError(trouble, said, refusal)
