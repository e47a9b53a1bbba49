"""A request whose body a mover receives, into memory that it shares with this process.

The mover only sends a given request and receives the answer. The caller's handler of answers
decides in this process what the answer means.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lazyfs.movers.context import tell_wire
from lazyfs.store import ranges
from lazyfs.store.addresses import BadAddressError, must_be_elsewhere
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.http import (
    Answer,
    Body,
    CutOffError,
    Transport,
    tls_context,
)
from lazyfs.store.refusals import MOST_TEXT

if TYPE_CHECKING:
    from lazyfs.movers.pool import Movers

T = TypeVar("T")

# The longest head of an answer, in characters. Answers with longer ones are read in this process.
MOST_HEADERS = 16 << 10

# Others have most likely died with a connection that fell silent, and the second attempt, after 4 s
# of silence, needs a new one.
MOST_IDLE_S = 4.0

# What `receive` returned or raised.
Told = dict[str, Any] | OSError | None

_transports = threading.local()
# Shared by the threads of a mover: to load all authorities takes 17 ms of a processor.
_tls = functools.cache(tls_context)


class NotMovedError(Exception):
    """The request must be made in this process: movers do not handle answers of this kind."""


class _MovedBody:
    """A body that a mover has received.

    Args:
        into: the buffer that it filled; None: the body is a short text.
        has_more: more bytes followed.
        came: if it was cut off, how many bytes came before; else None.
    """

    def __init__(
        self, into: memoryview | None, text: bytes, has_more: bool, came: int | None
    ) -> None:
        self._into = into
        self._came = came
        self._text = text
        self.is_at_end = not has_more

    def read_into(self, into: memoryview) -> None:
        if self._into is None or into.obj is not self._into.obj or len(into) != len(self._into):
            raise CutOffError("the body is not what was asked for")
        if self._came is not None:
            raise CutOffError(f"{len(into) - self._came} bytes are missing", self._came)

    def read_all(self, most: int) -> bytes:
        text, self._text = self._text[:most], self._text[most:]
        return text

    def skip(self, count: int) -> None:
        if count:
            raise CutOffError("the body is not what was asked for")


def exchange(
    movers: Movers,
    transport: Transport,
    server: str,
    authorities: str,
    refuse_local: bool,
    method: str,
    target: str,
    headers: Mapping[str, str],
    handle: Callable[[Answer], T],
    cancel: Cancel,
    into: memoryview,
) -> T:
    """Like `Transport.exchange`, for a server that is reached without a proxy.

    Args:
        transport: this process's connections to the server; told which address the mover reached.
        authorities: a file with trusted certificates.
        refuse_local: addresses of this machine are not contacted.
        into: for the body, if it has exactly this length. A view of a buffer of `take_buffer`.

    Raises:
        NotMovedError, MoverLostError, MoverFaultError: the request must be made in this process.
        CancelledError, OSError: as `Transport.exchange`.
    """
    told: Told
    try:
        told = movers.call(
            receive, server, authorities, refuse_local, method, target, dict(headers),
            buffer=into, wire=cancel,
        )  # fmt: skip
    except OSError as error:
        told = error
    return understand(told, transport, handle, cancel, into)


def understand(
    told: Told,
    transport: Transport,
    handle: Callable[[Answer], T],
    cancel: Cancel,
    into: memoryview,
) -> T:
    """Handle what a mover told of an answer. Raises as `exchange`."""
    if cancel.called:
        raise CancelledError
    if isinstance(told, TimeoutError | ConnectionError):
        raise told
    if told is None or isinstance(told, OSError):
        # In this process, the library's exception tells more, for example about a certificate.
        raise NotMovedError from told
    transport.address = told["address"]
    filled = into if told["filled"] else None
    body: Body = _MovedBody(filled, base64.b64decode(told["text"]), told["more"], told["came"])
    return handle(Answer(told["status"], told["headers"], told["length"], body))


def receive(
    server: str,
    authorities: str,
    refuse_local: bool,
    method: str,
    target: str,
    headers: dict[str, str],
    into: memoryview,
) -> dict[str, Any] | None:
    """Make a request, in a mover. Returns the answer for `exchange`; None: not handled here."""
    transport = _transport(server, authorities, refuse_local)
    transport.close_idle(MOST_IDLE_S)
    cut_off: dict[str, Any] | None = None

    def handle(answer: Answer) -> dict[str, Any] | None:
        length = answer.length
        if length is None and "content-encoding" not in answer.headers:
            length = ranges.told_length(answer.headers)
        fills = answer.status in (200, 206) and length == len(into)
        if sum(len(name) + len(value) for name, value in answer.headers.items()) > MOST_HEADERS:
            return None
        text, has_more = b"", False
        came: int | None = None
        if fills:
            try:
                answer.body.read_into(into)
                has_more = not answer.body.is_at_end
            except CutOffError as error:
                came = error.came
        elif answer.status in (200, 206):
            return None
        else:
            text = answer.body.read_all(MOST_TEXT)
        told = {
            "status": answer.status, "headers": dict(answer.headers), "length": answer.length,
            "filled": fills, "text": base64.b64encode(text).decode(), "more": has_more,
            "address": transport.address, "came": came,
        }  # fmt: skip
        if came is not None:
            nonlocal cut_off
            cut_off = told
            raise CutOffError("see what came of it")  # closes the connection
        return told

    try:
        return transport.exchange(method, target, headers, handle, _Told())
    except BadAddressError:
        return None
    except CutOffError:
        if cut_off is None:
            raise
        return cut_off


class _Told(Cancel):
    """The worker watches the connection, and ends the request by shutting it down."""

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        tell_wire(connection)
        yield


def _transport(server: str, authorities: str, refuse_local: bool) -> Transport:
    """Each thread of a mover has its own connection."""
    known: dict[Any, Transport] = _transports.__dict__.setdefault("known", {})
    about = (server, authorities, refuse_local)
    if about not in known:
        while len(known) >= 4:
            known.pop(next(iter(known))).close_idle(0.0)
        tls = _tls(authorities) if server.startswith("https:") else None
        known[about] = Transport(
            server, tls, may_connect=must_be_elsewhere if refuse_local else lambda address: None
        )
    return known[about]
