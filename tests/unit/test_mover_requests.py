"""Which answers a mover handles, and which are left to the worker."""

from __future__ import annotations

import base64
import email.utils
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from certificates import make_certificates
from test_source import ANSWER, DATA, PIN, Request, Serve, Service, part, refusal, serve

from lazyfs.errors import (
    BadResponseError,
    ObjectChangedError,
    ObjectGoneError,
    SourceError,
    ThrottledError,
)
from lazyfs.movers import process
from lazyfs.movers.call import value_of
from lazyfs.movers.pool import Movers
from lazyfs.store import mover_requests, range_reader
from lazyfs.store.cancel import Cancel
from lazyfs.store.http import Transport
from lazyfs.store.listing_page import Pinned
from lazyfs.store.s3_source import S3Source

__all__ = ["serve"]
LENGTH = 512


def chunked(answer: ANSWER) -> ANSWER:
    status, headers, body = answer
    named = headers | {"Transfer-Encoding": "chunked", "Content-Length": ""}
    return status, named, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def packed(answer: ANSWER) -> ANSWER:
    status, headers, body = answer
    return status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body)


def beginning(request: Request) -> ANSWER:
    request.headers["range"] = f"bytes=0-{LENGTH // 2}"
    return part(request)


def another_part(request: Request) -> ANSWER:
    request.headers["range"] = f"bytes=1-{LENGTH}"
    return part(request)


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover_requests, "tell_wire", lambda connection: None)


@pytest.mark.parametrize(
    ("answer", "filled"),
    [
        (part, True),
        (lambda request: (200, {}, DATA[:LENGTH]), True),
        (lambda request: chunked(part(request)), True),
        (beginning, None),
        (lambda request: chunked(beginning(request)), None),
        (lambda request: chunked(packed(part(request))), None),
        (lambda request: packed(part(request)), None),
        (lambda request: (200, {}, DATA), None),
        (lambda request: chunked((200, {}, DATA)), None),
        (lambda request: refusal(503, "SlowDown"), False),
    ],
)
def test_a_body_that_fills_the_buffer_is_received(
    serve: Serve, answer: object, filled: bool | None
) -> None:
    into = memoryview(bytearray(LENGTH))
    headers = {"Range": f"bytes=0-{LENGTH - 1}"}
    url = serve(answer).url  # type: ignore[arg-type]
    told = mover_requests.receive(url, "/none", False, "GET", "/bucket/m/k", headers, into)
    assert (told and told["filled"]) == filled
    assert (into == DATA[:LENGTH]) == bool(filled)
    if filled is False:
        assert told is not None
        assert b"SlowDown" in base64.b64decode(told["text"])


class Inline:
    """In the place of movers: calls here, and passes on what a mover would send."""

    def call(self, function: Callable[..., object], *arguments: object, **given: object) -> object:
        name = f"{function.__module__}:{function.__qualname__}"
        memory = SimpleNamespace(part=lambda offset, length: given["buffer"])
        told = process._answer(name, [*arguments], memory, [(0, 0)])  # type: ignore[arg-type]
        return value_of(json.loads(json.dumps(told)))

    async def wait_for_first(self, has_time: Callable[[], bool]) -> None:
        assert has_time()

    async def run(
        self, function: Callable[..., object], *arguments: object,
        ended: Callable[[], None], **given: object,
    ) -> object:  # fmt: skip
        try:
            return self.call(function, *arguments, **given)
        finally:
            ended()


def read(source: S3Source, pin: Pinned) -> tuple[bytes, bool]:
    """A range, and whether a mover alone brought it."""
    calls: list[int] = []

    async def ask() -> object:
        return await source.ranges.read_by_mover(
            pin, 0, LENGTH, Cancel(), lambda: True, lambda: calls.append(1)
        )

    source.use(cast(Movers, Inline()))
    found = trio.run(ask)
    assert calls == [1]
    if isinstance(found, memoryview):
        return bytes(found), True
    return bytes(source.ranges.read(pin, 0, LENGTH, asked=found)), False  # type: ignore[arg-type]


@pytest.fixture
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_reader, "LEAST_SHARED", 1)


@pytest.mark.usefixtures("any_length")
def test_an_ordinary_answer_needs_no_thread(serve: Serve) -> None:
    service = serve(part)
    assert read(service.source(), PIN) == (DATA[:LENGTH], True)
    assert len(service.requests) == 1
    assert "authorization" in service.requests[0].headers


@pytest.mark.usefixtures("any_length")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda request: refusal(503, "SlowDown"), ThrottledError),
        (lambda request: refusal(404, "NoSuchKey"), ObjectGoneError),
        (lambda request: part(request, etag='"v2"'), ObjectChangedError),
        (lambda request: another_part(request), BadResponseError),
    ],
)
def test_any_other_answer_is_judged_and_not_asked_for_again(
    serve: Serve, answer: Callable[[Request], ANSWER], error: type[SourceError]
) -> None:
    service = serve(answer)
    with pytest.raises(error):
        read(service.source(), PIN)
    assert len(service.requests) == 1


@pytest.mark.usefixtures("any_length")
def test_a_refused_clock_is_corrected_after_a_mover_too(serve: Serve) -> None:
    told = email.utils.formatdate(time.time() + 7200, usegmt=True)

    def answer(request: Request) -> ANSWER:
        if len(service.requests) == 1:
            return refusal(403, "RequestTimeTooSkewed", Date=told)
        return part(request)

    service = serve(answer)
    assert read(service.source(), PIN) == (DATA[:LENGTH], False)
    assert len(service.requests) == 2


@pytest.mark.usefixtures("any_length")
def test_a_range_in_parts_goes_on_after_the_first(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        start, end = request.range
        request.headers["range"] = f"bytes={start}-{min(end, start + LENGTH // 2 - 1)}"
        return part(request)

    service = serve(answer)
    assert read(service.source(), PIN) == (DATA[:LENGTH], False)


@pytest.mark.usefixtures("any_length")
def test_what_came_of_an_answer_that_a_mover_lost_is_not_asked_for_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request)
        headers |= {"Content-Length": str(len(body)), "Connection": "close"}
        return status, headers, body[:300]

    monkeypatch.setattr(range_reader, "LEAST_KEPT", 300)
    service = serve(answer)
    assert read(service.source(), PIN) == (DATA[:LENGTH], False)
    assert [request.range[0] for request in service.requests] == [0, 300]


def test_a_connection_that_was_idle_may_be_dead_and_is_not_used(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(part)
    headers = {"Range": f"bytes=0-{LENGTH - 1}"}
    into = memoryview(bytearray(LENGTH))

    def ask() -> int:
        mover_requests.receive(service.url, "/none", False, "GET", "/bucket/m/k", headers, into)
        (idle,) = mover_requests._transport(
            mover_requests._of_thread.known, service.url, "/none", False
        )._idle
        return id(idle.connection)

    assert ask() == ask()
    monkeypatch.setattr(mover_requests, "MOST_IDLE_S", -1.0)
    closed: list[float] = []
    close_idle = Transport.close_idle

    def note(transport: Transport, longer_than_s: float = 0.0) -> None:
        before = len(transport._idle)
        close_idle(transport, longer_than_s)
        closed.append(before - len(transport._idle))

    monkeypatch.setattr(Transport, "close_idle", note)
    ask()
    assert closed == [1]


@pytest.mark.usefixtures("any_length")
def test_a_mover_trusts_the_same_authorities(tmp_path: Path) -> None:
    authority, *pair = make_certificates(tmp_path / "ours", "DNS:s3.test")
    service = Service(part, *pair)
    try:
        source = service.source(authorities=authority)
        source.use(cast(Movers, Inline()))
        assert bytes(source.ranges.read(PIN, 0, LENGTH)) == DATA[:LENGTH]
        assert source._client._servers.get(service.url)[0]._idle == [], "the mover has asked"
    finally:
        service.close()


def test_the_address_that_a_mover_reached_is_known(serve: Serve) -> None:
    """Where a redirect may lead depends on it."""
    url = serve(lambda request: refusal(503, "SlowDown")).url
    transport = Transport(url)
    assert transport.address is None
    mover_requests.exchange(
        cast(Movers, Inline()), transport, url, "/none", False, "GET", "/bucket/m/k", {},
        lambda answer: answer.status, Cancel(), memoryview(bytearray(LENGTH)),
    )  # fmt: skip
    assert transport.address == "127.0.0.1"
