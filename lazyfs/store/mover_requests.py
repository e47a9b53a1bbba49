"""A request whose body a mover receives, into memory that it shares with this process.

The mover only sends a given request and receives the answer. The caller's handler of answers
decides in this process what the answer means.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from lazyfs.movers import context
from lazyfs.movers.call import MOST_BYTES, told_of
from lazyfs.movers.context import tell_wire
from lazyfs.store import ranges
from lazyfs.store.addresses import BadAddressError, must_be_elsewhere
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.http import Transport, tls_context
from lazyfs.store.http_answer import Answer, Body, CutOffError
from lazyfs.store.protocol import EACH
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

# Of the answers to several requests, this share is told together. If all were, new requests would
# begin only when the last of the former ones has ended, and the link would be idle meanwhile: in
# modelled time, a node with 100 Gbit/s gets 0.87 of its link, with a half 0.92.
SHARE_TOLD = 1 / 2
# In the place of an answer to a request that was cut off before anything came.
_NOTHING = "nothing"

# Connections of this process, by server: of one thread for `receive`, whose connection the worker
# watches, or of all threads for `receive_each`.
_of_thread = threading.local()
_shared: dict[Any, Transport] = {}
_lock = threading.Lock()
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
    known: dict[Any, Transport] = _of_thread.__dict__.setdefault("known", {})
    transport = _transport(known, server, authorities, refuse_local)
    return _receive(transport, method, target, headers, into, _Told())


def receive_each(
    server: str,
    authorities: str,
    refuse_local: bool,
    target: str,
    headers: dict[str, str],
    ranges: Sequence[str],
    patience_s: float,
    *into: memoryview,
) -> list[tuple[int, Any]]:
    """Request several ranges of an object at once, in a mover.

    The answers are told in two messages. After the word `EACH` from the worker, each is told as
    soon as it is there. After `STOP`, or the given time, requests end with what they have got.

    Args:
        ranges: the `Range` header of each request.
        patience_s: seconds.

    Returns:
        The answers that were not told before. Each is a number in `ranges`, and what `receive`
        returns, or an exception (`told_of`). A request that was cut off before anything came
        has none.
    """
    end_s = time.monotonic() + patience_s
    with _lock:
        transport = _transport(_shared, server, authorities, refuse_local)
    cancels = [Cancel() for _ in into]
    came: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    waker = os.eventfd(0, os.EFD_CLOEXEC)

    def get(which: int) -> None:
        wanted = {**headers, "Range": ranges[which]}
        told: Any = None
        try:
            told = _receive(transport, "GET", target, wanted, into[which], cancels[which])
        except OSError as error:
            told = told_of(error)
        except CancelledError:
            told = _NOTHING
        finally:
            is_long = len(json.dumps(told)) > MOST_BYTES // len(into) - 1024
            came.put((which, None if is_long else told))
            os.eventfd_write(waker, 1)

    threads: list[threading.Thread] = []
    try:
        for which in range(len(into)):
            thread = threading.Thread(target=get, args=[which], daemon=True)
            try:
                thread.start()
                threads.append(thread)
            except RuntimeError as error:  # no more threads are allowed
                came.put((which, told_of(OSError(errno.EAGAIN, str(error)))))
                os.eventfd_write(waker, 1)
        return _told_in_time(came, waker, cancels, end_s)
    except BaseException:
        # The threads write into buffers that count as free when this has ended.
        for cancel in cancels:
            cancel()
        for thread in threads:
            thread.join()
        raise
    finally:
        os.close(waker)


def _told_in_time(
    came: SimpleQueue[tuple[int, Any]], waker: int, cancels: Sequence[Cancel], end_s: float
) -> list[tuple[int, Any]]:
    """Wait for all answers; tell and return them as `receive_each`."""
    line = context.line()
    poll = select.poll()
    poll.register(waker, select.POLLIN)
    poll.register(line, select.POLLIN)
    is_stopped = tells_each = False
    missing = len(cancels)
    told: list[tuple[int, Any]] = []
    while missing:
        left_s = end_s - time.monotonic()
        ready = [file for file, _ in poll.poll(None if is_stopped else max(0.0, left_s) * 1000)]
        if line.fileno() in ready:
            word = line.recv(16)
            tells_each |= word == EACH
            left_s = left_s if word == EACH else 0.0
            if not word:  # the worker has ended
                poll.unregister(line)
        if left_s <= 0 and not is_stopped:
            # A thread may not end soon: one that resolves a name, for example.
            is_stopped = tells_each = True
            for cancel in cancels:
                cancel()
        if waker in ready:
            for _ in range(os.eventfd_read(waker)):
                which, answer = came.get()
                if answer != _NOTHING:
                    told.append((which, answer))
                missing -= 1
        if missing and len(told) >= (1 if tells_each else SHARE_TOLD * len(cancels)):
            with contextlib.suppress(OSError):  # the worker has ended
                context.tell(told)
            told = []
    return told


def _receive(
    transport: Transport,
    method: str,
    target: str,
    headers: dict[str, str],
    into: memoryview,
    cancel: Cancel,
) -> dict[str, Any] | None:
    """Make a request; returns as `receive`. Raises OSError, CancelledError: nothing came."""
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
        return transport.exchange(method, target, headers, handle, cancel)
    except BadAddressError:
        return None
    except (CutOffError, CancelledError):
        if cut_off is None:
            raise
        return cut_off


class _Told(Cancel):
    """The worker watches the connection, and ends the request by shutting it down."""

    @contextlib.contextmanager
    def watching(self, connection: socket.socket) -> Iterator[None]:
        tell_wire(connection)
        yield


def _transport(
    known: dict[Any, Transport], server: str, authorities: str, refuse_local: bool
) -> Transport:
    """The connections to a server, one of those that are known already or a new one."""
    about = (server, authorities, refuse_local)
    if about not in known:
        while len(known) >= 4:
            known.pop(next(iter(known))).close_idle(0.0)
        tls = _tls(authorities) if server.startswith("https:") else None
        known[about] = Transport(
            server, tls, may_connect=must_be_elsewhere if refuse_local else lambda address: None
        )
    return known[about]
