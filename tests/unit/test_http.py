"""Ranged GETs against servers that answer as they should not."""

from __future__ import annotations

import http.client
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from lazyfs.store import http as transport
from lazyfs.store.http import (
    Body,
    Cancel,
    CancelledError,
    OtherRangeError,
    Proxy,
    RefusedError,
    Transport,
    tls_context,
)

DATA = bytes(range(256)) * 8192  # two pieces
HEADERS = {"Range": f"bytes=0-{len(DATA) - 1}"}
HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{len(DATA) - 1}/{len(DATA)}\r\n"
).encode()
LENGTH = f"Content-Length: {len(DATA)}\r\n\r\n".encode()
ANSWER = HEAD + LENGTH + DATA


class Server:
    """Answers each connection by a function; remembers what was asked."""

    def __init__(self, serve: Callable[[int, Callable[[], str], Callable[[bytes], None]], None]):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._serve = serve
        self.heads: list[str] = []
        self.connections = 0
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(
                target=self._answer, args=[connection, self.connections], daemon=True
            ).start()

    def _answer(self, connection: socket.socket, number: int) -> None:
        with connection, connection.makefile("rb") as stream:

            def request() -> str:
                lines = itertools.takewhile(bool, iter(stream.readline, b"\r\n"))
                head = b"".join(lines).decode()
                if not head:
                    raise EOFError
                self.heads.append(head)
                return head

            try:
                self._serve(number, request, connection.sendall)
            except (EOFError, OSError):
                return

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def serving(
    serve: Callable[[int, Callable[[], str], Callable[[bytes], None]], None],
) -> Iterator[tuple[Server, Transport]]:
    server = Server(serve)
    client = Transport(f"http://127.0.0.1:{server.port}")
    try:
        yield server, client
    finally:
        client.close_idle(0.0)
        server.stop()


def get(client: Transport, cancel: Cancel | None = None) -> bytes:
    into = memoryview(bytearray(len(DATA)))
    client.get_range(
        "/bucket/key", HEADERS, 0, len(DATA), lambda body: body.read_into(into), cancel or Cancel()
    )
    return bytes(into)


def always(*answers: bytes) -> Callable[[int, Callable[[], str], Callable[[bytes], None]], None]:
    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        for answer in answers:
            request()
            send(answer)

    return serve


def test_a_connection_is_used_again() -> None:
    with serving(always(ANSWER, ANSWER, ANSWER)) as (server, client):
        assert [get(client) for _ in range(3)] == [DATA] * 3
        assert server.connections == 1
        assert "range: bytes=0-" in server.heads[0].lower()


def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    with serving(always(ANSWER)) as (server, client):
        assert [get(client) for _ in range(3)] == [DATA] * 3
        assert server.connections == 3


def test_a_new_connection_that_breaks_is_an_error() -> None:
    with serving(always(b"")) as (server, client):
        with pytest.raises(http.client.RemoteDisconnected):
            get(client)
        assert server.connections == 1


def test_a_connection_is_not_kept_when_the_server_wants_it_closed() -> None:
    closing_answer = HEAD + b"Connection: close\r\n" + LENGTH + DATA
    with serving(always(closing_answer, closing_answer)) as (server, client):
        assert get(client) == get(client) == DATA
        assert server.connections == 2


def test_idle_connections_are_closed() -> None:
    with serving(always(ANSWER, ANSWER)) as (server, client):
        get(client)
        client.close_idle()  # not long enough
        get(client)
        assert server.connections == 1
        client.close_idle(0.0)
        get(client)
        assert server.connections == 2


def test_a_body_in_chunks() -> None:
    body = f"{len(DATA):x}\r\n".encode() + DATA + b"\r\n0\r\n\r\n"
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body
    with serving(always(chunked, chunked)) as (server, client):
        assert get(client) == get(client) == DATA
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + LENGTH + DATA[:-1],
        HEAD + LENGTH + DATA[: len(DATA) // 3],
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"5\r\nabcde\r\n0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
    ],
)
def test_half_an_answer(answer: bytes) -> None:
    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(answer)

    with serving(serve) as (_, client), pytest.raises((OSError, http.client.HTTPException)):
        get(client)


@pytest.mark.parametrize(
    "answer",
    [
        HEAD.replace(b"bytes 0-", b"bytes 1-") + LENGTH + DATA,
        HEAD.replace(b"Content-Range", b"X-Range") + LENGTH + DATA,
        HEAD + f"Content-Length: {len(DATA) + 1}\r\n\r\n".encode() + DATA + b"x",
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + f"{len(DATA) + 1:x}\r\n".encode()
        + DATA
        + b"x\r\n0\r\n\r\n",
    ],
)
def test_another_range(answer: bytes) -> None:
    with serving(always(answer)) as (_, client), pytest.raises(OtherRangeError):
        get(client)


def test_a_refusal_tells_what_the_server_said() -> None:
    refusal = (
        b"HTTP/1.1 503 Slow Down\r\nX-Amz-Request-Id: R1\r\nContent-Length: 10\r\n\r\n<Code>Slow"
    )
    with serving(always(refusal)) as (_, client):
        with pytest.raises(RefusedError) as raised:
            get(client)
        assert raised.value.status == 503
        assert raised.value.headers["x-amz-request-id"] == "R1"
        assert raised.value.text == "<Code>Slow"


def test_the_whole_object_instead_of_a_range_is_refused() -> None:
    with serving(always(ANSWER.replace(b"206", b"200"))) as (_, client):
        with pytest.raises(RefusedError) as raised:
            get(client)
        assert raised.value.status == 200


def test_silence_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE_TIMEOUT_S", 0.2)
    over = threading.Event()

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(ANSWER[:-1])
        over.wait(30)

    with serving(serve) as (_, client), pytest.raises(TimeoutError):
        get(client)
    over.set()


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + LENGTH + DATA[:-1]])
def test_a_request_is_ended_by_another_thread(sent: bytes) -> None:
    over = threading.Event()

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(sent)
        threading.Timer(0.1, cancel).start()
        over.wait(30)

    cancel = Cancel()
    with serving(serve) as (_, client), pytest.raises(CancelledError):
        get(client, cancel)
    over.set()


def test_a_request_that_was_ended_before_is_not_made() -> None:
    cancel = Cancel()
    cancel()
    with serving(always(ANSWER)) as (server, client):
        with pytest.raises(CancelledError):
            get(client, cancel)
        assert server.heads == []


def test_ending_what_is_over_leaves_its_connection() -> None:
    with serving(always(ANSWER, ANSWER)) as (server, client):
        cancel = Cancel()
        get(client, cancel)
        cancel()
        get(client)
        assert server.connections == 1


def test_nobody_listens() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        get(Transport(f"http://127.0.0.1:{port}"))


def test_a_proxy_is_given_the_whole_url_and_who_we_are() -> None:
    with serving(always(ANSWER)) as (server, _):
        proxy = Proxy("127.0.0.1", server.port, {"Proxy-Authorization": "Basic c2VjcmV0"})
        assert "c2VjcmV0" not in repr(proxy)
        assert get(Transport("http://s3.test", None, proxy)) == DATA
        assert server.heads[0].startswith("GET http://s3.test/bucket/key HTTP/1.1")
        assert "Proxy-Authorization: Basic c2VjcmV0" in server.heads[0]


def test_a_tunnel_through_a_proxy_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    import certifi

    with serving(always(b"HTTP/1.1 403 Forbidden\r\n\r\n")) as (server, _):
        proxy = Proxy("127.0.0.1", server.port, {"Proxy-Authorization": "Basic c2VjcmV0"})
        with pytest.raises(OSError, match="403"):
            get(Transport("https://s3.test", tls_context(certifi.where()), proxy))
        assert server.heads[0].startswith("CONNECT s3.test:443")
        assert "Proxy-Authorization: Basic c2VjcmV0" in server.heads[0]


class Coming:
    """A body of which some bytes came, and somebody who waits for 1000 of them."""

    def __init__(self, ours: socket.socket, soon_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transport, "SOON_S", soon_s)
        answer = http.client.HTTPResponse(ours)
        answer.length = 1000
        self.body = Body(answer, ours)
        self.came = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.body.wait(1000)
        self.came.set()


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ours.settimeout(20)
    with ours, theirs:
        yield ours, theirs


def test_many_bytes_are_waited_for_at_once(
    connected: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = connected
    coming = Coming(ours, 60, monkeypatch)
    theirs.sendall(bytes(999))
    assert not coming.came.wait(0.1)
    theirs.sendall(b"!")
    assert coming.came.wait(20)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@pytest.mark.parametrize("ends", [True, False])
def test_fewer_will_do_if_no_more_come_soon(
    ends: bool, connected: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = connected
    coming = Coming(ours, 60 if ends else 0.01, monkeypatch)
    theirs.sendall(b"!")
    if ends:
        theirs.shutdown(socket.SHUT_WR)
    assert coming.came.wait(20)
