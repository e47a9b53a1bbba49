"""Which answers a mover handles, and which are left to the worker."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import gzip
import http.client
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from certificates import make_certificates
from test_source import (
    ANSWER,
    DATA,
    PIN,
    Request,
    Resolver,
    Serve,
    Service,
    part,
    refusal,
    serve,
)

from lazyfs.errors import (
    BadResponseError,
    CredentialsExpiredError,
    ObjectChangedError,
    ObjectGoneError,
    SourceError,
    ThrottledError,
)
from lazyfs.movers import context, process
from lazyfs.movers.call import MOST_BYTES, value_of
from lazyfs.movers.pool import Movers
from lazyfs.store import mover_requests, range_reader
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.http import Transport
from lazyfs.store.http_answer import Answer, CutOffError
from lazyfs.store.listing_page import Pinned
from lazyfs.store.mover_requests import MOST_HEADERS, NotMovedError
from lazyfs.store.protocol import EACH, STOP
from lazyfs.store.refusals import MOST_TEXT
from lazyfs.store.s3_source import S3Source
from lazyfs.store.signing import SigningCredentials

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


def told(**fields: object) -> mover_requests.Told:
    """What a mover tells of an answer of 8 bytes."""
    usual = {
        "status": 206, "headers": {"etag": '"v1"'}, "length": 8, "filled": True, "text": "",
        "more": False, "address": "192.0.2.7", "came": None,
    }  # fmt: skip
    return usual | fields


def understood(
    given: mover_requests.Told, handle: Callable[[Answer], object], cancel: Cancel | None = None
) -> object:
    into = memoryview(bytearray(8))
    transport = Transport("http://s3.test")
    found = mover_requests.understand(given, transport, handle, cancel or Cancel(), into)
    assert transport.address == "192.0.2.7"
    return found


def test_an_answer_that_a_mover_has_received_is_like_any_other() -> None:
    into = memoryview(bytearray(8))

    def handle(answer: Answer) -> str:
        assert (answer.status, answer.headers, answer.length) == (206, {"etag": '"v1"'}, 8)
        answer.body.skip(0)
        answer.body.read_into(into)
        assert answer.body.is_at_end
        return "handled"

    found = mover_requests.understand(told(), Transport("http://s3.test"), handle, Cancel(), into)
    assert found == "handled"
    assert understood(told(more=True), lambda answer: answer.body.is_at_end) is False


def test_the_text_of_an_answer_is_read_in_pieces() -> None:
    def handle(answer: Answer) -> list[bytes]:
        return [answer.body.read_all(most) for most in (2, 0, 100, 100)]

    text = base64.b64encode(b"refused").decode()
    assert understood(told(filled=False, text=text), handle) == [b"re", b"", b"fused", b""]


@pytest.mark.parametrize(
    ("fields", "into", "words", "came"),
    [
        ({"came": 3}, slice(0, 8), "5 bytes are missing", 3),
        ({}, slice(0, 7), "not what was asked for", 0),
        ({"filled": False}, slice(0, 8), "not what was asked for", 0),
        ({}, None, "not what was asked for", 0),
    ],
)
def test_a_body_is_for_the_buffer_that_a_mover_filled(
    fields: dict[str, object], into: slice | None, words: str, came: int
) -> None:
    asked = memoryview(bytearray(8))
    given = memoryview(bytearray(8)) if into is None else asked[into]
    with pytest.raises(CutOffError, match=words) as error:
        mover_requests.understand(
            told(**fields), Transport("http://s3.test"),
            lambda answer: answer.body.read_into(given), Cancel(), asked,
        )  # fmt: skip
    assert error.value.came == came


def test_nothing_of_a_body_that_a_mover_received_can_be_skipped() -> None:
    with pytest.raises(CutOffError, match="not what was asked for"):
        understood(told(), lambda answer: answer.body.skip(1))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (None, NotMovedError),
        (OSError(113, "No route to host"), NotMovedError),
        (TimeoutError("timed out"), TimeoutError),
        (ConnectionResetError("cut off"), ConnectionResetError),
    ],
)
def test_what_a_mover_could_not_do_is_done_here(
    given: mover_requests.Told, error: type[Exception]
) -> None:
    with pytest.raises(error):
        understood(given, pytest.fail)
    cancel = Cancel()
    cancel()
    with pytest.raises(CancelledError):
        understood(given, pytest.fail, cancel)


def receive(url: str, *, refuse_local: bool = False, length: int = LENGTH) -> Any:
    headers = {"Range": f"bytes=0-{length - 1}"}
    into = memoryview(bytearray(length))
    return mover_requests.receive(url, "/none", refuse_local, "GET", "/bucket/m/k", headers, into)


def test_addresses_of_this_machine_are_left_to_the_worker(serve: Serve) -> None:
    service = serve(part)
    assert receive(service.url, refuse_local=True) is None
    assert service.requests == []
    assert receive(service.url)["filled"]


@pytest.mark.parametrize("over", [0, 1])
def test_an_answer_with_a_long_head_is_left_to_the_worker(serve: Serve, over: int) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request)
        named = headers | {"Content-Length": str(len(body)), "Date": date, "Server": server}
        used = sum(len(name) + len(value) for name, value in named.items())
        return status, headers | {"x-a": "v" * (MOST_HEADERS - used - 3 + over)}, body

    date, server = email.utils.formatdate(0, usegmt=True), "test"
    with pytest.MonkeyPatch.context() as patch:
        handler = http.server.BaseHTTPRequestHandler
        patch.setattr(handler, "date_time_string", lambda *_: date)
        patch.setattr(handler, "version_string", lambda _: server)
        patch.setattr(http.client, "_MAXLINE", 1 << 20)
        found = receive(serve(answer).url)
    assert (found is None) == bool(over)


def test_more_than_was_asked_for_is_told_of(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request)
        return chunked((status, headers, body + b"more"))

    found = receive(serve(answer).url)
    assert (found["filled"], found["more"], found["length"]) == (True, True, None)


def test_an_answer_that_is_cut_off_is_told_with_what_came(serve: Serve) -> None:
    def answer(request: Request) -> ANSWER:
        status, headers, body = part(request)
        told = {"Content-Length": str(len(body)), "Connection": "close"}
        return status, headers | told, body[:300]

    found = receive(serve(answer).url)
    assert (found["filled"], found["came"], found["status"]) == (True, 300, 206)
    assert found["headers"]["etag"] == '"v1"'
    assert found["address"] == "127.0.0.1"


def test_the_text_of_a_refusal_has_a_bound(serve: Serve) -> None:
    found = receive(serve(lambda _: (503, {}, b"x" * (MOST_TEXT + 1))).url)
    assert (found["filled"], len(base64.b64decode(found["text"]))) == (False, MOST_TEXT)


def test_a_mover_keeps_connections_to_a_few_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(
        Transport, "close_idle", lambda transport, _: closed.append(transport._url.netloc)
    )
    known: dict[Any, Transport] = {}
    made = [
        mover_requests._transport(known, f"http://{name}", "/none", name == "d") for name in "abcd"
    ]
    assert closed == []
    again = [
        mover_requests._transport(known, f"http://{name}", "/none", name == "d") for name in "abcd"
    ]
    assert again == made
    for about in (("http://a", "/none", True), ("http://a", "/other", False)):
        assert mover_requests._transport(known, *about) not in made
    assert closed == ["a", "b"]
    assert len(known) == 4


@pytest.mark.usefixtures("any_length")
def test_a_mover_is_asked_for_the_same_request(serve: Serve) -> None:
    service = serve(part)
    source = service.source()
    assert bytes(source.ranges.read(PIN, 0, LENGTH)) == DATA[:LENGTH]
    assert read(source, PIN) == (DATA[:LENGTH], True)
    assert bytes(source.ranges.read(PIN, 0, LENGTH)) == DATA[:LENGTH]
    assert {(request.method, request.target) for request in service.requests} == {
        ("GET", "/bucket/m/k")
    }
    here, in_a_task, in_a_thread = (request.headers for request in service.requests)
    assert here == in_a_task == in_a_thread


@pytest.mark.usefixtures("any_length")
def test_a_signature_that_held_for_a_mover_may_hold_again(serve: Serve) -> None:
    answers = iter([part])
    service = serve(
        lambda request: next(answers, lambda _: refusal(403, "SignatureDoesNotMatch"))(request)
    )
    source = service.source()
    source._resolver = Resolver(SigningCredentials("id", "secret"))  # type: ignore[assignment]
    assert read(source, PIN) == (DATA[:LENGTH], True)
    with pytest.raises(CredentialsExpiredError, match="SignatureDoesNotMatch"):
        source.ranges.read(PIN, 0, LENGTH)


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


# Several ranges at once


@pytest.fixture
def line() -> Iterator[socket.socket]:
    """The worker's end of the line of this thread's call."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    with ours, theirs:
        context.serve(theirs)
        yield ours
    mover_requests._shared.clear()


def receive_each(url: str, count: int = 4, patience_s: float = 20.0) -> dict[int, Any]:
    """What is told at the end of ranges of `LENGTH` bytes, by their numbers."""
    asked = [f"bytes={number * LENGTH}-{(number + 1) * LENGTH - 1}" for number in range(count)]
    into = [memoryview(bytearray(LENGTH)) for _ in asked]
    headers = {"Host": "s3"}
    rest = mover_requests.receive_each(
        url, "/none", False, "/bucket/m/k", headers, asked, patience_s, *into
    )
    for number, answer in rest:
        if answer is not None and answer.get("filled") and answer["came"] is None:
            assert into[number] == DATA[number * LENGTH : (number + 1) * LENGTH]
    return dict(rest)


def told_before(line: socket.socket) -> dict[int, Any]:
    """What was told before the end."""
    found: dict[int, Any] = {}
    line.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found |= json.loads(line.recv(MOST_BYTES))["part"]
    return found


def test_a_half_of_the_answers_is_told_before_the_others(serve: Serve, line: socket.socket) -> None:
    may_come = threading.Event()
    told: list[int] = []

    def answer(request: Request) -> ANSWER:
        if request.range[0] >= 2 * LENGTH:
            may_come.wait(20)
        return part(request)

    def listen() -> None:
        told.extend(number for number, _ in json.loads(line.recv(MOST_BYTES))["part"])
        may_come.set()

    listener = threading.Thread(target=listen)
    listener.start()
    service = serve(answer)
    rest = receive_each(service.url)
    listener.join(20)
    assert (sorted(told), sorted(rest)) == ([0, 1], [2, 3])
    assert {request.target for request in service.requests} == {"/bucket/m/k"}
    assert {request.headers["host"] for request in service.requests} == {"s3"}
    assert sorted(request.range[0] for request in service.requests) == [0, 512, 1024, 1536]


def test_after_a_word_each_is_told_as_it_comes(serve: Serve, line: socket.socket) -> None:
    turn = threading.Semaphore(1)
    line.send(EACH)

    def answer(request: Request) -> ANSWER:
        turn.acquire(timeout=20)
        return part(request)

    told: list[dict[int, Any]] = []

    def listen() -> None:
        for _ in range(3):
            told.append(dict(json.loads(line.recv(MOST_BYTES))["part"]))
            turn.release()

    listener = threading.Thread(target=listen)
    listener.start()
    rest = receive_each(serve(answer).url)
    listener.join(20)
    assert [len(each) for each in (*told, rest)] == [1, 1, 1, 1]


def test_an_answer_that_is_too_long_to_tell_is_left_to_the_worker(
    serve: Serve, line: socket.socket
) -> None:
    length = MOST_BYTES // 4 * 3 // 4  # in Base64 too much for one of four, not for one of two
    service = serve(lambda _: (503, {}, b"x" * length))
    for count, is_told in ((2, True), (4, False)):
        answers = receive_each(service.url, count) | told_before(line)
        assert [answers[number] is not None for number in range(count)] == [is_told] * count


def test_what_a_request_met_is_told(line: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [ConnectionResetError(104, "reset"), ValueError("a fault"), None, CancelledError()]

    def failing(*arguments: Any) -> dict[str, Any]:
        number = int(arguments[3]["Range"].partition("=")[2].partition("-")[0]) // LENGTH
        if (error := errors[number]) is not None:
            raise error
        return {"filled": False}

    monkeypatch.setattr(mover_requests, "_receive", failing)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    rest = receive_each("http://127.0.0.1:9")
    rest |= told_before(line)
    assert rest == {
        0: {"kind": 1, "errno": 104, "text": "reset"}, 1: None, 2: {"filled": False},
    }  # fmt: skip


def test_where_no_more_threads_are_allowed_the_worker_is_told(
    serve: Serve, line: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(part).url
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if threading.current_thread() is threading.main_thread():
            begun.append(thread)
            if len(begun) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    rest = receive_each(url, 3)
    rest |= told_before(line)
    assert rest[0]["filled"]
    assert rest[1] == rest[2] == {"kind": 3, "errno": 11, "text": "can't start new thread"}


@pytest.mark.parametrize("by", ["end", "word", "time"])
def test_all_ends_with_the_worker_or_at_its_word_or_in_time(
    serve: Serve, line: socket.socket, by: str
) -> None:
    over = threading.Event()

    def answer(request: Request) -> ANSWER:
        over.wait(20)
        return part(request)

    if by == "end":
        line.shutdown(socket.SHUT_RDWR)
    elif by == "word":
        line.send(STOP)
    service = serve(answer)
    assert receive_each(service.url, patience_s=0.05 if by == "time" else 60.0) == {}
    over.set()
