"""HTTP for a store: connections that are kept open, and bodies that go where they are wanted.

A body goes from the socket straight into memory that was there before: one copy, made by the kernel
or by OpenSSL while other threads run. That is what other clients cannot do, which hand out memory
of their own: at 8 MiB a request it costs half the processor time (`bench/transport.py`).

What is asked, and what an answer means, `s3.py` knows.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from lazyfs.errors import OptionError
from lazyfs.store.cancel import Cancel

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
# A connection that is silent for this long is given up and the range is asked for again.
SILENCE_TIMEOUT_S = 20.0
# A connection that nobody needed for so long is closed: servers do so too, after a minute or less.
MOST_IDLE_S = 30.0
# Of a body, how much is received between two looks at the rest.
PIECE = 1 << 20
# Informational answers (103 and the like) before the real one.
MOST_INFORMATIONAL = 20


class CutOffError(ConnectionError):
    """The answer ended too early, or is no HTTP."""


class BadAddressError(Exception):
    """A name has an address at which nothing may be asked."""


class BadRedirectError(BadAddressError):
    """We were sent to where nothing may be asked."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, and what it is told with each request; its user's password, it may be."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)


class Body(Protocol):
    """The body of an answer. For one thread at a time."""

    def read_into(self, into: memoryview) -> None:
        """Fill a buffer. Raises OSError if less comes."""

    def read_all(self, most: int) -> bytes:
        """All that is left, but no more than `most` bytes. Raises OSError."""

    def skip(self, count: int) -> None:
        """Throw bytes away. Raises OSError if less comes."""

    @property
    def is_at_end(self) -> bool:
        """Whether all was taken; a body in chunks does not say its length before."""


class _ComingBody:
    """A body while it comes.

    Args:
        answer: whose head was read.
    """

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer

    def read_into(self, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                count = self._answer.readinto(into[done : done + PIECE])
            except http.client.HTTPException as error:
                raise CutOffError(_told(error)) from error
            if count == 0:
                raise CutOffError(f"{len(into) - done} bytes are missing")
            done += count

    def read_all(self, most: int) -> bytes:
        try:
            return self._answer.read(most)
        except http.client.HTTPException as error:
            raise CutOffError(_told(error)) from error

    def skip(self, count: int) -> None:
        into = memoryview(bytearray(min(count, PIECE)))
        while count:
            taken = into[: min(count, PIECE)]
            self.read_into(taken)
            count -= len(taken)

    @property
    def is_at_end(self) -> bool:
        return not self.read_all(1)


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body while it comes.

    Attributes:
        headers: with names in lower case; of a name that comes twice, the first value.
        length: of the body, in bytes; None: not told.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    body: Body


class _Response(http.client.HTTPResponse):
    """Passes over informational answers, which the library takes for the real one.

    RFC 9110, 15.2: a client must be able to parse one or more of them.
    """

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
    """Connections to one server, as many as there are requests at once.

    Args:
        server: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
        tls: for https.
        proxy: that leads there, or None.
        may_connect: is asked about each address of the server before any is connected to; raises
            what is to be raised if it may not be.
        timeouts_s: how long it is waited for a connection, and for more of an answer; None: as
            long as for S3.
    """

    def __init__(
        self,
        server: str,
        tls: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
        may_connect: Callable[[str], None] = lambda address: None,
        timeouts_s: tuple[float, float] | None = None,
    ) -> None:
        self._url = urlsplit(server)
        self._timeouts_s = timeouts_s
        self._tls = tls
        self._proxy = proxy
        self._may_connect = may_connect
        self._idle: list[_Idle] = []
        self._lock = threading.Lock()
        # That was connected to last.
        self.address: str | None = None
        # Addresses that could not be connected to; they are tried last.
        self._unreachable: set[str] = set()

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        handle: Callable[[Answer], T],
        cancel: Cancel,
    ) -> T:
        """Send a request without a body, and have the answer handled.

        Args:
            target: path and query, as they go over the wire.
            handle: takes what it needs of the body; what it returns is returned, what it raises is
                raised. Where it leaves some of the body, the connection is closed.
            cancel: ends it from another thread.

        Raises:
            CancelledError: `cancel` was called.
            OSError: no connection, or it broke, or it was silent.
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
                body = _ComingBody(response)
                handled = handle(Answer(response.status, told, response.length, body))
                is_over = body.is_at_end
        except TimeoutError:
            # What made this connection silent has most likely hit those that are as old.
            self._close_idle_since(began_s)
            raise
        if not is_over:
            connection.close()
        elif connection.sock is not None:  # else the server wanted it closed
            with self._lock:
                self._idle.append(_Idle(connection, time.monotonic()))
        return handled

    def connect_ahead(self) -> None:
        """Make a connection for the next request. Raises OSError, and what `may_connect` does."""
        connection = self._connect()
        with self._lock:
            self._idle.append(_Idle(connection, time.monotonic()))

    def close_idle(self, longer_than_s: float = MOST_IDLE_S) -> None:
        """Close the connections that nobody used for so long."""
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
        """Where a request was sent, its socket, and the head of the answer.

        The connection forgets its socket when the server wants it closed after the answer.
        """
        with self._lock:
            kept = self._idle.pop().connection if self._idle else None
        if kept is not None:
            began_s = time.monotonic()
            try:
                return kept, kept.sock, _answer_of(kept, method, target, headers, cancel)
            except TimeoutError:
                self._close_idle_since(began_s)  # they are silent together
            except (ConnectionError, ssl.SSLError):
                self.close_idle(0.0)  # the server has closed it, and the others are older
        connection = self._connect()
        wire = connection.sock  # the connection may forget it with the answer
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
        connection.response_class = _Response
        # How http.client makes its socket; its own way would look the name up once more.
        connection._create_connection = self._dial  # type: ignore[attr-defined]
        with _closed_on_error(connection):
            connection.connect()
            self.address = connection.sock.getpeername()[0]
            connection.sock.settimeout(silence_s)
        return connection

    def _dial(
        self, server: tuple[str, int], timeout_s: float, _source: tuple[str, int] | None
    ) -> socket.socket:
        """A socket to a server: what is checked is what is connected to. Raises OSError."""
        found = socket.getaddrinfo(*server, type=socket.SOCK_STREAM)
        addresses = [each[-1] for each in found]
        if not self._proxy:
            for address in addresses:
                self._may_connect(str(address[0]))
        # A host may have addresses of IPv6 where nothing of IPv6 gets through: that costs one
        # time-out, not one for each connection.
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
    """What a connection is secured with, as botocore does it.

    Args:
        authorities: a file of certificates that are trusted.

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


def may_be_redirected_to(address: str, from_address: str | None) -> None:
    """Whether a server may send us to another one of this address.

    An endpoint must not have us ask what only this machine can reach: its metadata service, or, if
    the endpoint itself is not on this machine, what listens on the loopback device.

    Raises:
        BadRedirectError: it may not.
    """
    target = ipaddress.ip_address(address.partition("%")[0])
    target = getattr(target, "ipv4_mapped", None) or target
    ours = from_address is not None and ipaddress.ip_address(from_address).is_loopback
    if (
        target.is_link_local
        or target.is_multicast
        or target.is_unspecified
        or (target.is_loopback and not ours)
    ):
        raise BadRedirectError(f"a redirect to the address {address} is not followed")


def must_be_elsewhere(address: str) -> None:
    """Whether an address is another machine's, as far as this one knows.

    Raises:
        BadAddressError: it is link-local, a loopback device's or this machine's own.
    """
    ours = "an address that is link-local or of this machine is not asked"
    target = ipaddress.ip_address(address.partition("%")[0])
    target = getattr(target, "ipv4_mapped", None) or target
    if target.is_link_local or target.is_loopback or target.is_multicast or target.is_unspecified:
        raise BadAddressError(ours)
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((str(target), 9))  # sends nothing
        # What this machine sends to itself comes from the address that it goes to.
        if ipaddress.ip_address(probe.getsockname()[0]) == target:
            raise BadAddressError(ours)


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


def _told(error: http.client.HTTPException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextlib.contextmanager
def _closed_on_error(connection: http.client.HTTPConnection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise
