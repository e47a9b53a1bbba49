"""HTTP for a store: persistent connections, and bodies that are received into given memory.

A body goes from the socket straight into memory that the caller owns: one copy, made by the kernel
or by OpenSSL while other threads run. Other clients cannot do that, because they return memory of
their own. At 8 MiB a request it halves the processor time (`bench/transport.py`).

This module knows nothing about S3: see `signed_client.py` and `s3_source.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from lazyfs.errors import OptionError
from lazyfs.store.cancel import Cancel

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
# A connection that is silent for this long is closed, and the range is requested again.
SILENCE_TIMEOUT_S = 20.0
# A connection that is idle for this long is closed: servers do so too, after a minute or less.
MOST_IDLE_S = 30.0
# How many bytes of a body are received before the rest is checked.
PIECE = 1 << 20
# A thread that receives a body is woken when this much has come, not for each record or segment.
WAKES_AT = 64 << 10
# The end of a body is received as it comes: less than `WAKES_AT` may be left in the kernel when
# OpenSSL has taken a part of a record (16 KiB).
LAST_BYTES = WAKES_AT + (32 << 10)
# The most informational answers (103 and the like) before the final one.
MOST_INFORMATIONAL = 20
# The longest head of an answer; curl accepts 300 KiB. An object may have hundreds of headers as
# metadata; the library's limit of 100 is raised for the whole process.
MOST_HEAD_BYTES = 256 << 10
http.client._MAXHEADERS = 2000  # type: ignore[attr-defined]


class CutOffError(ConnectionError):
    """The answer ended too early, after `came` bytes for the buffer, or is not HTTP."""

    def __init__(self, message: str, came: int = 0) -> None:
        super().__init__(message)
        self.came = came


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and the headers for it, which may contain a password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)


class Body(Protocol):
    """The body of an answer. For one thread at a time."""

    def read_into(self, into: memoryview) -> None:
        """Fill a buffer. Raises OSError if less comes."""

    def read_all(self, most: int) -> bytes:
        """The rest of the body, but at most `most` bytes. Raises OSError."""

    def skip(self, count: int) -> None:
        """Discard bytes. Raises OSError if less comes."""

    @property
    def is_at_end(self) -> bool:
        """Whether the whole body was read; a chunked body does not announce its length."""


class _ComingBody:
    """A body that is being received.

    Args:
        answer: an answer whose head was read.
        wire: the socket that it comes from.
    """

    def __init__(self, answer: http.client.HTTPResponse, wire: socket.socket) -> None:
        self._answer = answer
        self._wire = wire

    def read_into(self, into: memoryview) -> None:
        done = self._receive(into)
        while done < len(into):
            try:
                count = self._answer.readinto(into[done : done + PIECE])
            except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
                raise CutOffError(_told(error), done) from error
            if count == 0:
                raise CutOffError(f"{len(into) - done} bytes are missing", done)
            done += count

    def _receive(self, into: memoryview) -> int:
        """Fill a buffer from the socket, but for the end of it; returns the bytes received.

        The library would do the same with more calls for each 16 KiB, a record of TLS.
        """
        answer, wire = self._answer, self._wire
        if answer.length is None or answer.chunked or len(into) <= 2 * LAST_BYTES:
            return 0
        # First what the library has received ahead.
        done = answer.readinto(into[: len(answer.fp.peek())])
        # The end is left to the library, which sees that the body is over.
        begun, most = done, min(len(into), done + answer.length) - LAST_BYTES
        if done < most:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WAKES_AT)
            while done < most:
                try:
                    count = self._receive_some(into[done:most])
                except (ConnectionError, ssl.SSLError) as error:
                    raise CutOffError(_told(error), done) from error
                if count == 0:
                    raise CutOffError(f"{len(into) - done} bytes are missing", done)
                done += count
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            answer.length -= done - begun
        return done

    def _receive_some(self, into: memoryview) -> int:
        """As `socket.recv_into`. Raises TimeoutError only if nothing has come."""
        try:
            return self._wire.recv_into(into)
        except TimeoutError:
            poll = select.poll()
            poll.register(self._wire, select.POLLIN)
            self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            if not poll.poll(0):
                raise
            return self._wire.recv_into(into)

    def read_all(self, most: int) -> bytes:
        try:
            return self._answer.read(most)
        except http.client.HTTPException as error:
            raise CutOffError(_told(error)) from error

    def skip(self, count: int) -> None:
        into = memoryview(bytearray(min(count, PIECE)))
        while count:
            taken = into[: min(count, PIECE)]
            try:
                self.read_into(taken)
            except CutOffError as error:
                raise CutOffError(str(error)) from error
            count -= len(taken)

    @property
    def is_at_end(self) -> bool:
        return not self.read_all(1)


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body, which is being received.

    Attributes:
        headers: names are in lower case; of a repeated header, the first value.
        length: the length of the body in bytes; None if the answer does not say.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    body: Body


class _Head:
    """Reads the head of an answer, unless it is too long."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._left = MOST_HEAD_BYTES
        self.close = stream.close

    def readline(self, most: int) -> bytes:
        line = self._stream.readline(min(most, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.HTTPException(
                f"the headers of the answer have over {MOST_HEAD_BYTES >> 10} KiB"
            )
        return line


class Response(http.client.HTTPResponse):
    """Skips informational answers, which the library mistakes for the final one.

    RFC 9110, 15.2: a client must be able to parse one or more of them.
    """

    def begin(self) -> None:
        stream = self.fp
        self.fp = _Head(stream)  # type: ignore[assignment]
        try:
            super().begin()
        finally:
            if self.fp:  # it was not closed
                self.fp = stream

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INFORMATIONAL):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 < found[1] < 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                return found
            http.client.parse_headers(self.fp)
        raise http.client.BadStatusLine("informational answers only")


@dataclass(slots=True)
class _Idle:
    connection: http.client.HTTPConnection
    since_s: float


class Transport:
    """Connections to one server: as many as there are concurrent requests.

    Args:
        server: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
        tls: for https.
        proxy: the proxy to use, or None.
        may_connect: called with each address of the server before any connection is made; raises
            if the address must not be connected to.
        timeouts_s: how long to wait for a connection, and for more of an answer; None: as
            long as for S3.
        asks_silent_again: a request over a kept connection that falls silent is repeated over a new
            one, because a router on the way may have forgotten the connection.
    """

    def __init__(
        self,
        server: str,
        tls: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
        may_connect: Callable[[str], None] = lambda address: None,
        timeouts_s: tuple[float, float] | None = None,
        *,
        asks_silent_again: bool = True,
    ) -> None:
        self._asks_silent_again = asks_silent_again
        self._url = urlsplit(server)
        self._timeouts_s = timeouts_s
        self._tls = tls
        self._proxy = proxy
        self._may_connect = may_connect
        self._idle: list[_Idle] = []
        self._lock = threading.Lock()
        # The address of the last connection.
        self.address: str | None = None
        # Addresses to which connections failed; they are tried last.
        self._unreachable: set[str] = set()

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        handle: Callable[[Answer], T],
        cancel: Cancel,
    ) -> T:
        """Send a request without a body, and pass the answer to `handle`.

        Args:
            target: path and query, encoded for the wire.
            handle: reads what it needs of the body; its result is returned and its exceptions are
                raised. If it does not read the whole body, the connection is closed.
            cancel: ends the request from another thread.

        Raises:
            CancelledError: `cancel` was called.
            OSError: there was no connection, or it broke, or it was silent.
        """
        if self._proxy and self._url.scheme == "http":
            target = f"{self._url.scheme}://{self._url.netloc}{target}"
            headers = {**headers, **self._proxy.headers}
        began_s = time.monotonic()
        try:
            connection, wire, response = self._ask(method, target, headers, cancel)
            with _closed_on_error(connection), cancel.watching(wire):
                told: dict[str, str] = {}
                for name, value in response.getheaders():
                    told.setdefault(name.lower(), value)
                body = _ComingBody(response, wire)
                handled = handle(Answer(response.status, told, response.length, body))
                is_over = body.is_at_end
        except TimeoutError:
            # Connections of the same age have most likely failed for the same reason.
            self._close_idle_since(began_s)
            raise
        if not is_over:
            connection.close()
        elif connection.sock is not None:  # otherwise the server requested its end
            with self._lock:
                self._idle.append(_Idle(connection, time.monotonic()))
        return handled

    def connect_ahead(self) -> None:
        """Open a connection for the next request. Raises OSError, and what `may_connect` raises."""
        connection = self._connect()
        with self._lock:
            self._idle.append(_Idle(connection, time.monotonic()))

    def close_idle(self, longer_than_s: float = MOST_IDLE_S) -> None:
        """Close connections that have been idle for this long."""
        self._close_idle_since(time.monotonic() - longer_than_s)

    def _close_idle_since(self, before_s: float) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
            self._idle = [each for each in idle if each.since_s > before_s]
        for each in idle:
            if each.since_s <= before_s:
                each.connection.close()

    def _ask(
        self, method: str, target: str, headers: Mapping[str, str], cancel: Cancel
    ) -> tuple[http.client.HTTPConnection, socket.socket, http.client.HTTPResponse]:
        """Send a request; return its connection, the socket, and the head of the answer.

        The connection loses its socket if the server requests a close after the answer.
        """
        with self._lock:
            kept = self._idle.pop().connection if self._idle else None
        if kept is not None:
            began_s = time.monotonic()
            try:
                return kept, kept.sock, _answer_of(kept, method, target, headers, cancel)
            except TimeoutError:
                self._close_idle_since(began_s)  # they fall silent together
                if not self._asks_silent_again:
                    raise
            except (ConnectionError, ssl.SSLError):
                self.close_idle(0.0)  # the server has closed it, and the other idle ones are older
        connection = self._connect()
        wire = connection.sock  # the connection may drop it with the answer
        return connection, wire, _answer_of(connection, method, target, headers, cancel)

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._proxy:
            host, port = self._proxy.host, self._proxy.port
        to_connect_s, silence_s = self._timeouts_s or (CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S)
        connection: http.client.HTTPConnection
        if self._url.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=to_connect_s, context=self._tls
            )
            if self._proxy:
                beyond = self._url.hostname or ""
                connection.set_tunnel(beyond, self._url.port or 443, dict(self._proxy.headers))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=to_connect_s)
        connection.response_class = Response
        # http.client calls this to make its socket; by default it would resolve the name again.
        connection._create_connection = self._dial  # type: ignore[attr-defined]
        with _closed_on_error(connection):
            connection.connect()
            self.address = connection.sock.getpeername()[0]
            connection.sock.settimeout(silence_s)
        return connection

    def _dial(
        self, server: tuple[str, int], timeout_s: float, _source: tuple[str, int] | None
    ) -> socket.socket:
        """A socket to a server, connected to an address that was checked. Raises OSError."""
        found = socket.getaddrinfo(*server, type=socket.SOCK_STREAM)
        addresses = [each[-1] for each in found]
        if not self._proxy:
            for address in addresses:
                self._may_connect(str(address[0]))
        # A host may have IPv6 addresses that cannot be reached from here: that costs one timeout,
        # not one for each connection.
        addresses.sort(key=lambda address: str(address[0]) in self._unreachable)
        failed: OSError | None = None
        for address in addresses:
            try:
                connected = socket.create_connection((str(address[0]), server[1]), timeout_s)
            except OSError as error:
                failed = error
                self._unreachable.add(str(address[0]))
            else:
                self._unreachable.discard(str(address[0]))
                return connected
        assert failed is not None
        raise failed


def tls_context(authorities: str) -> ssl.SSLContext:
    """The TLS settings of a connection, the same as botocore's.

    Args:
        authorities: a file with trusted certificates.

    Raises:
        OptionError: it cannot be read, or holds none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(authorities)
    except OSError as error:
        raise OptionError(f"--ca-bundle: {authorities}: {error.strerror or error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _answer_of(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str],
    cancel: Cancel,
) -> http.client.HTTPResponse:
    with _closed_on_error(connection), cancel.watching(connection.sock):
        try:
            connection.request(method, target, headers=dict(headers))
            return connection.getresponse()
        except http.client.HTTPException as error:
            raise CutOffError(_told(error)) from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextlib.contextmanager
def _closed_on_error(connection: http.client.HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise
