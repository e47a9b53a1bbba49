"""Ranged GETs over HTTP connections that are kept open.

A body goes from the socket straight into memory that was there before: one copy, made by the kernel
or by OpenSSL while other threads run. That is what other clients cannot do, which hand out memory
of their own: at 8 MiB a request it costs half the processor time (`bench/transport.py`). Or it goes
where it is wanted without coming into memory at all (`passage.py`).

What is asked, and what an answer means, `source.py` knows.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

from lazyfs.blocks.buffers import take_buffer

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
# A connection that is silent for this long is given up and the range is asked for again.
SILENCE_TIMEOUT_S = 20.0
# So long many bytes are waited for, where few would do.
SOON_S = 0.1
# A connection that nobody needed for so long is closed: servers do so too, after a minute or less.
MOST_IDLE_S = 30.0
# Of a body, how much is received between two looks at the rest.
PIECE = 1 << 20
# Of the text that comes with a refusal, how much is read.
MOST_TEXT = 64 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")


class RefusedError(Exception):
    """The server answered, but not with the range.

    Attributes:
        status: of HTTP.
        headers: of the answer; names in lower case.
        text: the beginning of the body.
    """

    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.text = text


class OtherRangeError(Exception):
    """The server answered with other bytes than were asked for; the message says which."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and what it is told with each request; its user's password, it may be."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)


class CancelledError(Exception):
    """Another thread did not want the answer any more."""


class Cancel:
    """Lets another thread end a request: what waits for the server wakes up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.called = False

    def __call__(self) -> None:
        """End it, whether it has begun or not; without effect when it is over."""
        with self._lock:
            self.called = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the server was faster
                    # Of TLS, too, only the connection: its state is the other thread's.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        """A request is made over this connection.

        Raises:
            CancelledError: in the place of whatever comes of it once it was ended.
        """
        try:
            with self._lock:
                self._socket = connection
                if self.called:
                    raise CancelledError
            yield
        except Exception as error:
            if self.called:
                raise CancelledError from error
            raise
        finally:
            with self._lock:
                self._socket = None
        if self.called:  # what was received may be cut off
            raise CancelledError


class Body:
    """The body of an answer, while it comes. For one thread at a time.

    Args:
        answer: whose head was read.
        wire: that it comes through.
    """

    def __init__(self, answer: http.client.HTTPResponse, wire: socket.socket) -> None:
        self._answer = answer
        # In chunks, or encrypted, more comes through the socket than the body.
        is_bare = answer.length is not None and not isinstance(wire, ssl.SSLSocket)
        self._socket = wire if is_bare else None

    @property
    def descriptor(self) -> int | None:
        """Of the socket, if nothing but the body comes through it. It does not block."""
        return self._socket.fileno() if self._socket else None

    @property
    def left(self) -> int:
        """How many bytes are still to be taken, if it has a descriptor."""
        assert self._answer.length is not None
        return self._answer.length

    def read(self, length: int) -> memoryview:
        """So many bytes, in a buffer of `take_buffer`. Raises as `read_into` does."""
        into = take_buffer(length)
        self.read_into(into)
        return into

    def read_into(self, into: memoryview) -> None:
        """Fill a buffer. Raises OSError or http.client.HTTPException if less comes."""
        done = 0
        while done < len(into):
            count = self._answer.readinto(into[done : done + PIECE])
            if count == 0:
                raise http.client.IncompleteRead(b"", len(into) - done)
            done += count

    def take_buffered(self) -> bytes:
        """What came along with the head. Only after that is the rest in the socket."""
        reader = self._answer.fp
        data = reader.read(min(self.left, len(reader.peek())))
        self.took(len(data))
        return data

    def took(self, count: int) -> None:
        """So many bytes were taken out of the descriptor."""
        self._answer.length = self.left - count

    @property
    def is_ready(self) -> bool:
        """Whether there is something in the descriptor, be it the end."""
        return self._poll(0)

    def wait(self, count: int) -> None:
        """Wait until so many bytes are ready, or no more come; on a slow line, for some of them.

        Before Linux 4.18 any number will do (socket(7), SO_RCVLOWAT).

        Raises:
            TimeoutError: nothing comes for a long time.
        """
        assert self._socket is not None
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        try:
            is_ready = self._poll(SOON_S)
        finally:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if not is_ready and not self._poll(SILENCE_TIMEOUT_S):
            raise TimeoutError

    def _poll(self, timeout_s: float) -> bool:
        assert self._socket is not None
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        return bool(watch.poll(timeout_s * 1000))

    def end(self) -> None:
        """All was taken. Raises OtherRangeError if there is more."""
        if self._answer.read(1):  # a body in chunks does not say its length before
            raise OtherRangeError("got more bytes than were asked for")


@dataclass(slots=True)
class _Idle:
    connection: http.client.HTTPConnection
    since_s: float


class Transport:
    """Connections to one host, as many as there are requests at once.

    Args:
        endpoint: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
        tls: for https.
        proxy: that leads there, or None.
    """

    def __init__(
        self, endpoint: str, tls: ssl.SSLContext | None = None, proxy: Proxy | None = None
    ) -> None:
        self._url = urlsplit(endpoint)
        self._tls = tls
        self._proxy = proxy
        self._idle: list[_Idle] = []
        self._lock = threading.Lock()

    def get_range(
        self,
        target: str,
        headers: Mapping[str, str],
        start: int,
        length: int,
        receive: Callable[[Body], T],
        cancel: Cancel,
    ) -> T:
        """Ask for `length` bytes of an object from `start`, and have them received.

        Args:
            target: path and query, as they go over the wire.
            headers: of the request, `Range` included.
            receive: takes all of the body; what it returns is returned, what it raises is raised.
            cancel: ends it from another thread.

        Raises:
            RefusedError: the answer is not 206.
            OtherRangeError: it is another range.
            CancelledError: `cancel` was called.
            OSError, http.client.HTTPException: no connection, or it broke, or it was silent.
        """
        if self._proxy and self._url.scheme == "http":
            target = f"{self._url.scheme}://{self._url.netloc}{target}"
            headers = {**headers, **self._proxy.headers}
        connection, wire, answer = self._ask(target, headers, cancel)
        with _closed_on_error(connection), cancel.watching(wire):
            if answer.status != 206:
                text = answer.read(MOST_TEXT).decode(errors="replace")
                raise RefusedError(
                    answer.status,
                    {name.lower(): value for name, value in answer.getheaders()},
                    text,
                )
            _check_range(answer, start, length)
            body = Body(answer, wire)
            received = receive(body)
            body.end()
        if connection.sock is not None:  # else the server wanted it closed
            with self._lock:
                self._idle.append(_Idle(connection, time.monotonic()))
        return received

    def close_idle(self, longer_than_s: float = MOST_IDLE_S) -> None:
        """Close the connections that nobody used for so long."""
        before_s = time.monotonic() - longer_than_s
        with self._lock:
            idle, self._idle = self._idle, []
            self._idle = [each for each in idle if each.since_s > before_s]
        for each in idle:
            if each.since_s <= before_s:
                each.connection.close()

    def _ask(
        self, target: str, headers: Mapping[str, str], cancel: Cancel
    ) -> tuple[http.client.HTTPConnection, socket.socket, http.client.HTTPResponse]:
        """Where a request was sent, its socket, and the head of the answer.

        The connection forgets its socket when the server wants it closed after the answer.
        """
        with self._lock:
            kept = self._idle.pop().connection if self._idle else None
        if kept is not None:
            with contextlib.suppress(ConnectionError, http.client.BadStatusLine):
                return kept, kept.sock, _answer_of(kept, target, headers, cancel)
            self.close_idle(0.0)  # the server has closed it, and the others are older
        connection = self._connect()
        return connection, connection.sock, _answer_of(connection, target, headers, cancel)

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._proxy:
            host, port = self._proxy.host, self._proxy.port
        connection: http.client.HTTPConnection
        if self._url.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=CONNECT_TIMEOUT_S, context=self._tls
            )
            if self._proxy:
                beyond = self._url.hostname or ""
                connection.set_tunnel(beyond, self._url.port or 443, dict(self._proxy.headers))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
        with _closed_on_error(connection):
            connection.connect()
            connection.sock.settimeout(SILENCE_TIMEOUT_S)
        return connection


def tls_context(authorities: str) -> ssl.SSLContext:
    """What a connection is secured with, as boto3 does it.

    Args:
        authorities: a file of certificates that are trusted.

    Raises:
        OSError: it cannot be read, or holds none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authorities)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _answer_of(
    connection: http.client.HTTPConnection,
    target: str,
    headers: Mapping[str, str],
    cancel: Cancel,
) -> http.client.HTTPResponse:
    with _closed_on_error(connection), cancel.watching(connection.sock):
        connection.request("GET", target, headers=dict(headers))
        return connection.getresponse()


@contextlib.contextmanager
def _closed_on_error(connection: http.client.HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _check_range(answer: http.client.HTTPResponse, start: int, length: int) -> None:
    told = answer.getheader("Content-Range", "")
    found = _CONTENT_RANGE.match(told)
    if found is None or (int(found[1]), int(found[2])) != (start, start + length - 1):
        raise OtherRangeError(f"asked for {length} bytes at {start}, got {told!r}")
    if answer.length not in (None, length):
        raise OtherRangeError(f"asked for {length} bytes at {start}, got {answer.length}")
