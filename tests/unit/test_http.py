"""Ranged GETs against servers that answer as they should not."""

from __future__ import annotations

import http.client
import itertools
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from certificates import make_certificates

from lazyfs.errors import OptionError
from lazyfs.store import http as transport
from lazyfs.store.addresses import (
    BadAddressError,
    BadRedirectError,
    may_be_redirected_to,
    must_be_elsewhere,
)
from lazyfs.store.cancel import Cancel, CancelledError
from lazyfs.store.http import Proxy, Transport, tls_context
from lazyfs.store.http_answer import Answer, Body, CutOffError

T = TypeVar("T")

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


def exchange(client: Transport, receive: Callable[[Body], T], cancel: Cancel | None = None) -> T:
    """Ask for a range, and have its body received."""
    return client.exchange(
        "GET", "/bucket/key", HEADERS, lambda answer: receive(answer.body), cancel or Cancel()
    )


def get(client: Transport, cancel: Cancel | None = None) -> bytes:
    into = memoryview(bytearray(len(DATA)))
    exchange(client, lambda body: body.read_into(into), cancel)
    return bytes(into)


def take(body: Body, length: int) -> bytes:
    into = memoryview(bytearray(length))
    body.read_into(into)
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


def test_connections_that_the_server_has_closed_are_replaced_together() -> None:
    together = threading.Barrier(3)

    def serve(number: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        if number <= 3:
            together.wait(20)
        send(ANSWER)

    with serving(serve) as (server, client):
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda _: get(client), range(3))) == [DATA] * 3
        assert len(client._idle) == 3
        assert get(client) == DATA
        assert len(client._idle) == 1, "the others are closed as well"
        assert server.connections == 4


def test_a_connection_whose_encryption_broke_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = transport._answer_of

    def broken(connection: http.client.HTTPConnection, *rest: object) -> http.client.HTTPResponse:
        if connection is kept:
            raise ssl.SSLEOFError("EOF occurred in violation of protocol")
        return ask(connection, *rest)  # type: ignore[arg-type]

    with serving(always(ANSWER, ANSWER)) as (server, client):
        get(client)
        kept = client._idle[0].connection
        monkeypatch.setattr(transport, "_answer_of", broken)
        assert get(client) == DATA
        assert server.connections == 2


Dialled = list[tuple[tuple[str, int], float]]


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> Dialled:
    """What is connected to in vain, and how long. The address of a host is its name's."""
    seen: Dialled = []

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (f"address of {host}", port))]

    def never(address: tuple[str, int], timeout_s: float) -> socket.socket:
        seen.append((address, timeout_s))
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", never)
    return seen


@pytest.mark.parametrize(
    ("server", "port"),
    [("http://s3.test", 80), ("https://s3.test", 443), ("http://s3.test:9000", 9000),
     ("https://s3.test:9443", 9443)],
)  # fmt: skip
@pytest.mark.parametrize("timeouts_s", [None, (0.5, 7.0)])
def test_the_port_of_the_server_is_connected_to(
    dialled: Dialled, server: str, port: int, timeouts_s: tuple[float, float] | None
) -> None:
    allowed: list[str] = []
    client = Transport(server, ssl.create_default_context(), None, allowed.append, timeouts_s)
    with pytest.raises(ConnectionRefusedError):
        get(client)
    expected_s = 0.5 if timeouts_s else transport.CONNECT_TIMEOUT_S
    assert dialled == [(("address of s3.test", port), expected_s)]
    assert allowed == ["address of s3.test"]


@pytest.mark.parametrize("server", ["http://s3.test", "https://s3.test:9443"])
def test_a_proxy_may_be_anywhere(dialled: Dialled, server: str) -> None:
    proxy = Proxy("proxy.test", 3128, {})
    client = Transport(server, ssl.create_default_context(), proxy, pytest.fail)
    with pytest.raises(ConnectionRefusedError):
        get(client)
    assert [address for address, _ in dialled] == [("address of proxy.test", 3128)]


@pytest.mark.parametrize("timeouts_s", [None, (0.5, 7.0)])
def test_a_connection_may_be_silent_for_longer_than_it_takes_to_make(
    timeouts_s: tuple[float, float] | None,
) -> None:
    with serving(always(ANSWER)) as (server, _):
        client = Transport(f"http://127.0.0.1:{server.port}", timeouts_s=timeouts_s)
        client.connect_ahead()
        assert client.address == "127.0.0.1"
        silence_s = client._idle[0].connection.sock.gettimeout()
        assert silence_s == (7.0 if timeouts_s else transport.SILENCE_TIMEOUT_S)
        assert get(client) == DATA
        assert server.connections == 1
        client.close_idle(0.0)


def test_an_address_that_can_be_reached_again_is_tried_first_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    first, second = "192.0.2.1", "192.0.2.2"
    unreachable = {first, second}
    connect, resolve = socket.create_connection, socket.getaddrinfo

    def look_up(host: str, port: int, *rest: Any, **named: Any) -> Any:
        if host != "two.test":
            return resolve(host, port, *rest, **named)
        return [(0, 0, 0, "", (address, port)) for address in (first, second)]

    def connecting(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.append(address[0])
        if address[0] in unreachable:
            raise ConnectionRefusedError(address[0])
        return connect(("127.0.0.1", address[1]), timeout_s)

    with serving(always(ANSWER)) as (server, _):
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(socket, "create_connection", connecting)
        client = Transport(f"http://two.test:{server.port}")
        with pytest.raises(ConnectionRefusedError, match=second):
            client.connect_ahead()
        for now in ({first}, set[str](), {second}, set[str]()):
            unreachable = now
            client.connect_ahead()
        client.close_idle(0.0)
    assert tried == [first, second, first, second, second, second, first, first]


def test_of_a_repeated_header_the_first_counts() -> None:
    answer = HEAD + b"ETag: one\r\nEtag: two\r\n" + LENGTH
    with serving(always(answer)) as (_, client):
        told = client.exchange("HEAD", "/", {}, lambda given: given.headers, Cancel())
        assert told["etag"] == "one"


def test_an_address_that_cannot_be_reached_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    connect, look_up = socket.create_connection, socket.getaddrinfo

    def connecting(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.append(address[0])
        if ":" in address[0]:
            raise TimeoutError
        return connect(address, timeout_s)

    def resolved(host: str, port: int, *rest: Any, **named: Any) -> Any:
        if host != "two.test":
            return look_up(host, port, *rest, **named)
        return [(0, 0, 0, "", ("2001:db8::1", port, 0, 0)), (0, 0, 0, "", ("127.0.0.1", port))]

    with serving(always(ANSWER)) as (server, _):
        monkeypatch.setattr(socket, "getaddrinfo", resolved)
        monkeypatch.setattr(socket, "create_connection", connecting)
        client = Transport(f"http://two.test:{server.port}")
        assert [get(client) for _ in range(3)] == [DATA] * 3
        client.close_idle(0.0)
    assert tried == ["2001:db8::1", *["127.0.0.1"] * 3]


def test_a_new_connection_that_breaks_is_an_error() -> None:
    with serving(always(b"")) as (server, client):
        with pytest.raises(ConnectionError):
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


SIZES = (1, 5000, 131_073, 200_003, 3, 70_001, 800_000, 131_073)
RANDOM = random.Random(1).randbytes(sum(SIZES))
SIZED = f"HTTP/1.1 200 OK\r\nContent-Length: {len(RANDOM)}\r\n".encode()


def take_all(body: Body) -> bytes:
    return b"".join([take(body, size) for size in SIZES])


@pytest.mark.parametrize("ends", [b"\r\n", b"Connection: close\r\n\r\n"])
@pytest.mark.parametrize("piece", [7_001, 65_536, 1 << 20])
def test_a_body_is_received_in_parts_of_all_sizes(ends: bytes, piece: int) -> None:
    """However the bytes arrive, and wherever the reader's parts end."""

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        for _turn in range(2):
            request()
            for start in range(0, len(answer := SIZED + ends + RANDOM), piece):
                send(answer[start : start + piece])

    with serving(serve) as (server, client):
        assert [exchange(client, take_all) for _ in range(2)] == [RANDOM] * 2
        assert server.connections == (2 if b"close" in ends else 1)


def test_a_body_over_tls_is_received_in_parts_of_all_sizes(tmp_path: Path) -> None:
    authority, certificate, key = make_certificates(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "http/1.1"])

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wire:
            assert wire.selected_alpn_protocol() == "http/1.1"
            for _ in range(2):
                while not wire.recv(4096).endswith(b"\r\n\r\n"):
                    pass
                wire.sendall(SIZED + b"\r\n" + RANDOM)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(lambda: serve(listener.accept()[0]))
        client = Transport(
            f"https://127.0.0.1:{listener.getsockname()[1]}", tls_context(str(authority))
        )
        assert [exchange(client, take_all) for _ in range(2)] == [RANDOM] * 2
        client.close_idle(0.0)
        served.result(10)


@pytest.mark.parametrize("last", [1, 52_000, 60_000, 65_000, 70_000, 90_000, 100_000])
def test_the_end_of_a_body_over_tls_may_come_late(tmp_path: Path, last: int) -> None:
    """OpenSSL holds a part of a record then, and the kernel has less to give than is on its way."""
    authority, certificate, key = make_certificates(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(received, sent, server_side=True)
        for step in (tls.do_handshake, tls.read):
            while True:
                try:
                    step()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(sent.read())
                    received.write(connection.recv(65_536))
        connection.sendall(sent.read())
        answer = memoryview(SIZED + b"\r\n" + RANDOM)
        while answer:
            answer = answer[tls.write(answer) :]
        records = sent.read()
        connection.sendall(records[:-last])
        time.sleep(0.3)  # until the reader has all of it
        connection.sendall(records[-last:])
        ended.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(lambda: serve(listener.accept()[0]))
        client = Transport(
            f"https://127.0.0.1:{listener.getsockname()[1]}", tls_context(str(authority)),
            timeouts_s=(5.0, 5.0), asks_silent_again=False,
        )  # fmt: skip
        began_s = time.monotonic()
        assert exchange(client, lambda body: take(body, len(RANDOM))) == RANDOM
        assert time.monotonic() - began_s < 4, "it did not wait for the timeout"
        ended.set()
        client.close_idle(0.0)
        served.result(10)


def test_a_slow_body_is_not_silent() -> None:
    """Less may come within the timeout than wakes the thread."""

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:-900_000])
        for _turn in range(6):
            time.sleep(0.2)
            send(DATA[:5_000])
        send(DATA[:-30_000][-870_000:])

    with serving(serve) as (server, _):
        client = Transport(
            f"http://127.0.0.1:{server.port}", timeouts_s=(5.0, 0.5), asks_silent_again=False
        )
        assert len(get(client)) == len(DATA)
        client.close_idle(0.0)


@pytest.mark.parametrize("sent", [0, 100_000, len(DATA) - 70_000, len(DATA) - 1])
def test_a_body_that_ends_too_early_is_an_error(sent: int) -> None:
    with (
        serving(always(HEAD + LENGTH + DATA[:sent])) as (_, client),
        pytest.raises(CutOffError, match="are missing"),
    ):
        get(client)


@pytest.mark.parametrize("last", [1, 60_000])
def test_the_end_of_a_body_need_not_come_at_once(last: int) -> None:
    """The thread sleeps until much has come, but never waits for more than there is."""
    received, in_time = threading.Event(), list[bool]()

    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:-last])
        in_time.append(received.wait(5))
        send(DATA[-last:])
        request()

    def receive(body: Body) -> bytes:
        begun = take(body, len(DATA) - last)
        received.set()
        return begun + take(body, last)

    with serving(serve) as (_, client):
        assert exchange(client, receive) == DATA
        assert in_time == [True]


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
def test_truncated_answers_are_errors(answer: bytes) -> None:
    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(answer)

    with serving(serve) as (_, client), pytest.raises(OSError):
        get(client)


@pytest.mark.parametrize("size", [10, len(DATA) // 3, len(DATA) - 1])
def test_what_came_before_an_answer_was_cut_off_is_known(size: int) -> None:
    def serve(_: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        send(HEAD + LENGTH + DATA[:size])

    with serving(serve) as (_, client), pytest.raises(CutOffError) as error:
        get(client)
    assert error.value.came == size


def test_status_and_headers_are_passed_on_unchanged() -> None:
    refusal = (
        b"HTTP/1.1 503 Slow Down\r\nX-Amz-Request-Id: R1\r\nContent-Length: 10\r\n\r\n<Code>Slow"
    )

    def told(answer: Answer) -> tuple[int, str, int | None, bytes]:
        body = answer.body.read_all(1000)
        return answer.status, answer.headers["x-amz-request-id"], answer.length, body

    with serving(always(refusal, ANSWER)) as (server, client):
        found = client.exchange("GET", "/", {}, told, Cancel())
        assert found == (503, "R1", 10, b"<Code>Slow")
        assert get(client) == DATA
        assert server.connections == 1


def test_informational_answers_come_before_the_real_one() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    with serving(always(b"HTTP/1.1 100 Continue\r\n\r\n" + early + early + ANSWER)) as (_, client):
        assert get(client) == DATA


def test_nothing_but_informational_answers() -> None:
    with (
        serving(always(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)) as (_, client),
        pytest.raises(CutOffError),
    ):
        get(client)


METADATA = b"".join(b"X-Amz-Meta-%d: %s\r\n" % (number, b"v" * 100) for number in range(500))


def test_an_answer_may_have_hundreds_of_headers() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\n" + METADATA + b"\r\n"
    with serving(always(early + HEAD + METADATA + LENGTH + DATA, ANSWER)) as (server, client):
        assert get(client) == DATA
        assert get(client) == DATA
        assert server.connections == 1


@pytest.mark.parametrize(
    "headers", [METADATA * 10, b"X-A: " + b"v" * (1 << 20), b"a:\r\n" * 70_000]
)
def test_headers_without_end_are_an_error(headers: bytes) -> None:
    with (
        serving(always(HEAD + headers)) as (_, client),
        pytest.raises(CutOffError, match="header"),
    ):
        get(client)


def test_a_connection_with_an_unread_body_is_closed() -> None:
    with serving(always(ANSWER, ANSWER)) as (server, client):
        assert exchange(client, lambda body: take(body, 10)) == DATA[:10]
        assert get(client) == DATA
        assert server.connections == 2


def test_a_connection_is_reused_after_a_head() -> None:
    with serving(always(HEAD + LENGTH, ANSWER)) as (server, client):
        length = client.exchange(
            "HEAD", "/", {}, lambda answer: answer.headers["content-length"], Cancel()
        )
        assert length == str(len(DATA))
        assert get(client) == DATA
        assert server.connections == 1


def test_connections_that_fall_silent_together_cost_one_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All connections of the first requests are silent from then on; new ones are answered."""
    monkeypatch.setattr(transport, "SILENCE_TIMEOUT_S", 4.0)
    kept = 20
    together = threading.Barrier(kept)
    over = threading.Event()

    def serve(number: int, request: Callable[[], str], send: Callable[[bytes], None]) -> None:
        request()
        if number <= kept:
            together.wait(20)
            send(ANSWER)
            request()
            over.wait(30)
        else:
            send(ANSWER)

    with serving(serve) as (server, client):
        with ThreadPoolExecutor(kept) as threads:
            assert list(threads.map(lambda _: get(client), range(kept))) == [DATA] * kept
        assert server.connections == kept
        assert get(client) == get(client) == DATA
        over.set()
        silent = server.heads[kept:]
        assert len(silent) == 3, "one that was silent, and two that were answered"


@pytest.mark.parametrize(
    ("address", "before", "allowed"),
    [
        ("93.184.216.34", "10.0.0.1", True),
        ("10.0.0.7", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.1", False),
        ("::1", "10.0.0.1", False),
        ("::ffff:127.0.0.1", "10.0.0.1", False),
        ("169.254.169.254", "10.0.0.1", False),
        ("169.254.169.254", "127.0.0.1", False),
        ("fe80::1%eth0", "10.0.0.1", False),
        ("0.0.0.0", "10.0.0.1", False),
        ("224.0.0.1", "10.0.0.1", False),
        ("ff02::1", "10.0.0.1", False),
        ("127.0.0.1", None, False),
        ("10.0.0.7", None, True),
    ],
)
def test_allowed_redirects(address: str, before: str | None, allowed: bool) -> None:
    if allowed:
        may_be_redirected_to(address, before)
    else:
        with pytest.raises(BadRedirectError, match=f"address {address} is not followed"):
            may_be_redirected_to(address, before)


NOT_CONTACTED = r"^link-local addresses and addresses of this machine are not contacted$"


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("127.8.9.10", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("169.254.169.254", False),
        ("fe80::1%lo", False),
        ("0.0.0.0", False),
        ("::", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
    ],
)
def test_addresses_that_pods_may_not_reach(address: str, allowed: bool) -> None:
    if allowed:
        must_be_elsewhere(address)
    else:
        with pytest.raises(BadAddressError, match=NOT_CONTACTED):
            must_be_elsewhere(address)


def test_addresses_of_this_machine_are_refused() -> None:
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout
    for address in own.split():
        with pytest.raises(BadAddressError, match=NOT_CONTACTED):
            must_be_elsewhere(address)


def test_a_name_with_a_bad_address_is_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at its other address; and it is looked up once, so that it cannot change."""
    lookups = []

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        lookups.append(host)
        kind = socket.AF_INET, socket.SOCK_STREAM, 6, ""
        return [(*kind, ("127.0.0.1", port)), (*kind, ("127.0.0.9", port))]

    def may_connect(address: str) -> None:
        if address == "127.0.0.9":
            raise BadAddressError(address)

    with serving(always(ANSWER)) as (server, _):
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        url = f"http://two.test:{server.port}"
        with pytest.raises(BadAddressError):
            get(Transport(url, may_connect=may_connect))
        assert server.heads == [] and lookups == ["two.test"]


def test_a_silent_connection_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_ending_a_finished_request_keeps_its_connection() -> None:
    with serving(always(ANSWER, ANSWER)) as (server, client):
        cancel = Cancel()
        get(client, cancel)
        cancel()
        get(client)
        assert server.connections == 1


def test_a_server_that_is_not_listening() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        get(Transport(f"http://127.0.0.1:{port}"))


def test_a_proxy_gets_the_whole_url_and_our_credentials() -> None:
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


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file or directory"), ("nothing", "no certificate or crl found")],
)
def test_authorities_that_cannot_be_read_are_named(
    tmp_path: Path, text: str | None, words: str
) -> None:
    authorities = tmp_path / "ca.pem"
    if text is not None:
        authorities.write_text(text)
    with pytest.raises(OptionError, match=rf"--ca-bundle: {authorities}: .*{words}"):
        tls_context(str(authorities))


def test_a_request_tells_how_much_has_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        cancel = Cancel()
        assert cancel.received_bytes() is None, "there is no connection yet"
        with wire, peer, cancel.watching(wire):
            before = cancel.received_bytes()
            assert before is not None
            peer.sendall(bytes(1000))
            wire.recv(1000, socket.MSG_WAITALL)
            assert cancel.received_bytes() == before + 1000
        assert cancel.received_bytes() is None


def test_received_bytes_are_known_even_if_the_server_closes_the_connection() -> None:
    seen = []

    def receive(body: Body) -> None:
        seen.append(cancel.received_bytes())
        body.read_into(memoryview(bytearray(5)))

    cancel = Cancel()
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n12345"
    with serving(always(closing)) as (_, client):
        exchange(client, receive, cancel)
    assert seen[0], "it can be watched, and be ended from another thread"
