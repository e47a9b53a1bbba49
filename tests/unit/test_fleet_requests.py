"""The cache of a fleet, as one node asks it: what it may answer, and how it may fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_source import ANSWER, Request, Serve, refusal, serve

from lazyfs.store import fleet_cache, ranges
from lazyfs.store.addresses import BadAddressError
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.fleet_cache import FleetCache, FleetCacheError, Trouble
from lazyfs.store.http_answer import Answer

__all__ = ["serve"]


def body_of(answer: Answer) -> bytes:
    return answer.body.read_all(1000)


def ask_of(cache: FleetCache) -> bytes:
    return cache.ask("/b/k?x=1", {"Host": "s3", "Range": "bytes=0-3"}, body_of, Cancel())


def ask(url: str) -> bytes:
    return ask_of(FleetCache(url))


def trouble_of(url: str) -> FleetCacheError:
    with pytest.raises(FleetCacheError) as error:
        ask(url)
    return error.value


@pytest.mark.parametrize("status", [200, 206, 299])
def test_it_is_asked_as_s3_is(serve: Serve, status: int) -> None:
    service = serve(lambda _: (status, {}, b"data"))
    assert ask(service.url) == b"data"
    (asked,) = service.requests
    assert (asked.method, asked.target) == ("GET", "/b/k?x=1")
    assert (asked.headers["host"], asked.headers["range"]) == ("s3", "bytes=0-3")


@pytest.mark.parametrize(
    ("answer", "trouble", "said"),
    [
        (refusal(404, "NoSuchKey"), Trouble.REFUSED, "answered 404 NoSuchKey"),
        ((404, {}, b""), Trouble.REFUSED, "answered 404"),
        ((300, {}, b""), Trouble.REFUSED, "answered 300"),
        ((499, {}, b""), Trouble.REFUSED, "answered 499"),
        ((500, {}, b""), Trouble.FAILED, "answered 500"),
        ((502, {}, b"<html/>"), Trouble.FAILED, "answered 502"),
        (refusal(503, "SlowDown"), Trouble.S3_TROUBLE, "answered 503 SlowDown"),
    ],
)
def test_a_refusal_says_whether_it_is_of_s3(
    serve: Serve, answer: ANSWER, trouble: Trouble, said: str
) -> None:  # fmt: skip
    error = trouble_of(serve(lambda _: answer).url)
    assert (error.trouble, str(error)) == (trouble, said)
    assert error.refusal is not None
    assert error.refusal.status == answer[0]
    assert not error.is_certain


@pytest.mark.parametrize(
    "fault", [ranges.ChangedError, ranges.OtherRangeError, ranges.IgnoresRangeError]
)
def test_another_range_is_wrong(serve: Serve, fault: type[Exception]) -> None:
    def handle(_: Answer) -> None:
        raise fault("not this")

    cache = FleetCache(serve(lambda _: (206, {}, b"data")).url)
    with pytest.raises(FleetCacheError, match="not this") as error:
        cache.ask("/b/k", {}, handle, Cancel())
    assert (error.value.trouble, error.value.is_certain) == (Trouble.WRONG, False)


def test_a_cache_that_is_not_there_is_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for url in (closed, f"unix:{tmp_path}/none"):
        error = trouble_of(url)
        assert (error.trouble, error.refusal, error.is_certain) == (Trouble.AWAY, None, True)
        assert "no connection (" in str(error)
        with pytest.raises(FleetCacheError, match="no connection") as connecting:
            FleetCache(url).connect()
        assert connecting.value.trouble is Trouble.AWAY


class Door:
    """A Unix socket, or a port, behind which one connection after another gets the same bytes."""

    def __init__(self, path: Path | None, answer: bytes) -> None:
        self.heads: list[bytes] = []
        self.answer = answer
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.url = f"unix:{path}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                while head := connection.recv(4096):
                    self.heads.append(head)
                    connection.sendall(self.answer)
                    if self.answer and not self.answer.endswith(b"data"):
                        break

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[list[Door]]:
    whole = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\n\r\ndata"
    made = [Door(tmp_path / "door", whole), Door(tmp_path / "cut", whole[:-3]), Door(None, whole)]
    yield made
    for door in made:
        door.close()


def test_a_cache_may_be_behind_a_unix_socket(doors: list[Door]) -> None:
    cache = FleetCache(doors[0].url)
    cache.connect()
    assert cache.ask("/b/k", {"Host": "s3"}, body_of, Cancel()) == b"data"
    assert cache.ask("/b/k", {"Host": "s3"}, body_of, Cancel()) == b"data"
    assert doors[0].heads[0].startswith(b"GET /b/k HTTP/1.1\r\n")
    assert b"Host: s3\r\n" in doors[0].heads[0]
    cache.close_idle()


def test_an_answer_that_ends_too_early_is_cut_off(doors: list[Door]) -> None:
    def handle(answer: Answer) -> None:
        answer.body.read_into(memoryview(bytearray(4)))

    with pytest.raises(FleetCacheError, match=r"cut off \(") as error:
        FleetCache(doors[1].url).ask("/b/k", {"Host": "s3"}, handle, Cancel())
    assert (error.value.trouble, error.value.is_certain) == (Trouble.CUT_OFF, True)


def test_a_cache_that_does_not_answer_is_silent(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    over = threading.Event()

    def answer(_: Request) -> ANSWER:
        over.wait(30)
        return 200, {}, b""

    monkeypatch.setattr(fleet_cache, "SILENCE_TIMEOUT_S", 0.2)
    service = serve(answer)
    try:
        error = trouble_of(service.url)
    finally:
        over.set()
    assert (error.trouble, str(error), error.is_certain) == (
        Trouble.SILENT, "silent for 0.2 s", False,
    )  # fmt: skip
    assert len(service.requests) == 1, "it is not asked again"


@pytest.mark.parametrize("which", [0, 2])
def test_a_kept_connection_that_falls_silent_is_not_replaced(doors: list[Door], which: int) -> None:
    """S3 is asked instead."""
    door = doors[which]
    cache = FleetCache(door.url)
    assert ask_of(cache) == b"data"
    door.answer = b""
    cache._connections._idle[0].connection.sock.settimeout(0.05)
    with pytest.raises(FleetCacheError, match="silent for 60 s"):
        ask_of(cache)
    assert len(door.heads) == 2


def test_a_connection_is_made_sooner_than_an_answer_comes(
    serve: Serve, doors: list[Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s: list[float | None] = []

    class Watched(socket.socket):
        def connect(self, address: Any, /) -> None:
            waited_s.append(self.gettimeout())
            super().connect(address)

    caches = [FleetCache(serve(lambda _: (206, {}, b"data")).url), FleetCache(doors[0].url)]
    monkeypatch.setattr(socket, "socket", Watched)
    for cache in caches:
        cache.connect()
        silence_s = cache._connections._idle[0].connection.sock.gettimeout()
        assert silence_s == fleet_cache.SILENCE_TIMEOUT_S
        assert ask_of(cache) == b"data", "it is asked over this connection"
        cache._connections.close_idle(0.0)
    assert waited_s == [fleet_cache.CONNECT_TIMEOUT_S] * 2


@pytest.mark.parametrize(
    ("error", "trouble", "said"),
    [
        (OSError(5, "Input/output error"), Trouble.CUT_OFF, "cut off (Input/output error)"),
        (ConnectionError("3 bytes are missing"), Trouble.CUT_OFF, "cut off (3 bytes are missing)"),
        (ConnectionResetError(), Trouble.CUT_OFF, "cut off (ConnectionResetError)"),
        (BadAddressError("not there"), Trouble.AWAY, "not there"),
        (TimeoutError("timed out"), Trouble.SILENT, "silent for 60 s"),
    ],
)
def test_trouble_is_told_in_a_few_words(
    serve: Serve, error: Exception, trouble: Trouble, said: str
) -> None:
    def handle(_: Answer) -> bytes:
        raise error

    with pytest.raises(FleetCacheError) as told:
        FleetCache(serve(lambda _: (206, {}, b"data")).url).ask("/b/k", {}, handle, Cancel())
    assert (told.value.trouble, str(told.value), told.value.refusal) == (trouble, said, None)
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), OSError("No route to host")])
def test_why_no_connection_was_made_is_told(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def never(*_: object) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_connection", never)
    for act in (ask_of, FleetCache.connect):
        with pytest.raises(FleetCacheError) as told:
            act(FleetCache("http://127.0.0.1:9"))
        assert str(told.value) == "no connection (No route to host)"


def test_a_request_that_is_not_wanted_any_more_is_no_trouble(serve: Serve) -> None:
    cancel = Cancel()
    cancel()
    with pytest.raises(CancelledError):
        FleetCache(serve(lambda _: (200, {}, b"")).url).ask("/b/k", {}, body_of, cancel)
