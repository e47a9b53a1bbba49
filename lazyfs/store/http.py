"""HTTP for a store: persistent connections to one server.

This module knows nothing about S3: see `signed_client.py` and `s3_source.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

from lazyfs.errors import OptionError
from lazyfs.store.cancel import Cancel
from lazyfs.store.http_answer import Answer, ComingBody, CutOffError, Response, told_of

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
# A connection that is silent for this long is closed, and the range is requested again.
SILENCE_TIMEOUT_S = 20.0
# A connection that is idle for this long is closed: servers do so too, after a minute or less.
MOST_IDLE_S = 30.0
# What OpenSSL says when the first bytes of an answer are no TLS; the second one since version 3.2.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and the headers for it, which may contain a password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)


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
                body = ComingBody(response, wire)
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
            try:
                connection.connect()
            except ssl.SSLError as error:
                if error.reason in _NO_TLS:
                    raise ConnectionError("it does not answer in TLS; is it http://?") from error
                raise
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
        if isinstance(failed, TimeoutError):  # not a server that is silent
            raise ConnectionError(f"no connection within {timeout_s:g} s") from failed
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
            raise CutOffError(told_of(error)) from error


@contextlib.contextmanager
def _closed_on_error(connection: http.client.HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise
