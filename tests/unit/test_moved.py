"""Which answers a mover handles, and which are left to the worker."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable
from typing import cast

import pytest
from test_source import ANSWER, DATA, Request, Serve, part, refusal, serve

from lazyfs.movers.pool import Movers
from lazyfs.store import moved
from lazyfs.store.cancel import Cancel
from lazyfs.store.http import Transport

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


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "tell_wire", lambda connection: None)


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
    told = moved.receive(url, "/none", False, "GET", "/bucket/m/k", headers, into)
    assert (told and told["filled"]) == filled
    assert (into == DATA[:LENGTH]) == bool(filled)
    if filled is False:
        assert told is not None
        assert b"SlowDown" in base64.b64decode(told["text"])


class Inline:
    """In the place of movers: calls here."""

    def call(self, function: Callable[..., object], *arguments: object, **given: object) -> object:
        return function(*arguments, given["buffer"])


def test_the_address_that_a_mover_reached_is_known(serve: Serve) -> None:
    """Where a redirect may lead depends on it."""
    url = serve(lambda request: refusal(503, "SlowDown")).url
    transport = Transport(url)
    assert transport.address is None
    moved.exchange(
        cast(Movers, Inline()), transport, url, "/none", False, "GET", "/bucket/m/k", {},
        lambda answer: answer.status, Cancel(), memoryview(bytearray(LENGTH)),
    )  # fmt: skip
    assert transport.address == "127.0.0.1"
