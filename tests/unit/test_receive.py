"""Bodies that are received without the interpreter's lock."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from certificates import make_certificates

from lazyfs.cli import checks
from lazyfs.cli.checks import Outcome
from lazyfs.store._receive import knows_tls, receive
from lazyfs.store.http import tls_context

DATA = os.urandom(3_000_001)
Serve = Callable[[socket.socket], None]
# What is around the memory that may be written.
FENCE = bytes(range(64))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def connected(
    certificates: tuple[Path, Path, Path] | None, serve: Serve, timeout_s: float = 20.0
) -> Iterator[socket.socket]:
    """A connection to a server, over TLS if there are certificates."""

    def answer() -> None:
        wire, _ = listener.accept()
        with wire:
            if certificates is None:
                serve(wire)
            else:
                _, certificate, key = certificates
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate, key)
                with context.wrap_socket(wire, server_side=True) as secret:
                    serve(secret)

    with ThreadPoolExecutor(1) as pool:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            served = pool.submit(answer)
            wire = socket.create_connection(listener.getsockname(), timeout_s)
            if certificates is not None:
                wire = tls_context(str(certificates[0])).wrap_socket(
                    wire, server_hostname="127.0.0.1"
                )
            with wire:
                yield wire
        with contextlib.suppress(OSError):
            served.result(20)


def tls_of(wire: socket.socket) -> object | None:
    return getattr(wire, "_sslobj", None)


def take(wire: socket.socket, size: int) -> tuple[bytes, str | None]:
    """Receive `size` bytes, with nothing written beside them; returns them and the reason."""
    memory = bytearray(FENCE + bytes(size) + FENCE)
    into = memoryview(memory)[len(FENCE) : len(FENCE) + size]
    count, why = receive(wire.fileno(), tls_of(wire), into, wire.gettimeout() or 0.0)
    assert memory[: len(FENCE)] == memory[len(FENCE) + size :] == FENCE
    assert not any(into[count:]), "only what was counted is written"
    return bytes(into[:count]), why


def silent_after(count: int, over: threading.Event) -> Serve:
    """A server that sends so many bytes, and then nothing until the test is over."""

    def serve(wire: socket.socket) -> None:
        wire.sendall(DATA[:count])
        over.wait(10)

    return serve


@pytest.fixture(params=["plain", "tls"])
def transport(
    request: pytest.FixtureRequest, certificates: tuple[Path, Path, Path]
) -> tuple[Path, Path, Path] | None:
    return certificates if request.param == "tls" else None


Transport = tuple[Path, Path, Path] | None


def test_the_tls_of_this_python_is_known(certificates: tuple[Path, Path, Path]) -> None:
    """Otherwise nothing would be received here, and Python would take each record."""
    assert knows_tls()
    with connected(certificates, lambda wire: wire.sendall(DATA)) as wire:
        assert take(wire, 1) == (DATA[:1], None)


@pytest.mark.parametrize("sizes", [(1, 5, 16_384, 99, 2_000_000, 983_512), (3_000_001,), (0, 7)])
def test_memory_is_filled_and_the_rest_stays(transport: Transport, sizes: tuple[int, ...]) -> None:
    with connected(transport, lambda wire: wire.sendall(DATA)) as wire:
        came = [take(wire, size) for size in sizes]
        assert [why for _, why in came] == [None] * len(sizes)
        done = sum(sizes)
        assert b"".join(data for data, _ in came) == DATA[:done]
        if done < len(DATA):
            assert wire.recv(1) == DATA[done : done + 1], "Python's functions go on"


@pytest.mark.parametrize("piece", [1_000, 70_001])
def test_bytes_may_come_in_any_pieces(transport: Transport, piece: int) -> None:
    def serve(wire: socket.socket) -> None:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, 500_000, piece):
            wire.sendall(DATA[start : min(start + piece, 500_000)])
            time.sleep(0.0005)

    with connected(transport, serve) as wire:
        assert take(wire, 500_000) == (DATA[:500_000], None)


def test_an_early_end_is_told_with_what_came(transport: Transport) -> None:
    with connected(transport, lambda wire: wire.sendall(DATA[:100_000])) as wire:
        came, why = take(wire, 200_000)
    assert came == DATA[:100_000]
    assert why and ("closed" in why or "eof" in why)


def test_a_reset_is_told() -> None:
    def serve(wire: socket.socket) -> None:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with connected(None, serve) as wire:
        time.sleep(0.1)
        assert take(wire, 100) == (b"", "Connection reset by peer")


def test_bytes_that_are_no_tls_are_told(certificates: tuple[Path, Path, Path]) -> None:
    """And the next error of the same thread is not mistaken for it."""

    def serve(wire: socket.socket) -> None:
        wire.sendall(DATA[:20_000])
        socket.socket.send(wire, b"HTTP/1.1 500 Internal Server Error\r\n\r\n" * 10)
        wire.recv(1)

    with connected(certificates, serve) as wire:
        came, why = take(wire, 1_000_000)
        assert came == DATA[:20_000]
        # OpenSSL 3.2 and newer look at the length of a record before its version.
        is_new = ssl.OPENSSL_VERSION_INFO >= (3, 2)
        assert why == ("packet length too long" if is_new else "wrong version number")
    with connected(certificates, lambda wire: wire.sendall(DATA)) as wire:
        assert take(wire, 100_000) == (DATA[:100_000], None)


@pytest.mark.parametrize("sent", [0, 10, 70_000])
def test_silence_is_a_time_out(transport: Transport, sent: int) -> None:
    """However little or much came before, and soon after the limit."""
    over = threading.Event()

    with connected(transport, silent_after(sent, over), timeout_s=0.3) as wire:
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            take(wire, 500_000)
        over.set()
        assert 0.3 <= time.monotonic() - began_s < 2


def test_what_comes_slowly_is_not_silent(transport: Transport) -> None:
    def serve(wire: socket.socket) -> None:
        for start in range(0, 5_000, 1_000):
            wire.sendall(DATA[start : start + 1_000])
            time.sleep(0.2)
        wire.sendall(DATA[5_000:400_000])

    with connected(transport, serve, timeout_s=0.5) as wire:
        assert take(wire, 400_000) == (DATA[:400_000], None)


def test_another_thread_ends_it(transport: Transport) -> None:
    over = threading.Event()

    with connected(transport, silent_after(10, over)) as wire, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take, wire, 500_000)
        time.sleep(0.2)
        socket.socket.shutdown(wire, socket.SHUT_RDWR)
        came, why = taken.result(5)
        over.set()
    assert came == DATA[:10]
    assert why


def test_other_threads_run_meanwhile(transport: Transport) -> None:
    over = threading.Event()

    def serve(wire: socket.socket) -> None:
        over.wait(10)
        wire.sendall(DATA)

    with connected(transport, serve) as wire, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take, wire, len(DATA))
        time.sleep(0.1)
        assert not taken.done()
        over.set()
        assert taken.result(10) == (DATA, None)


def test_signals_are_handled_at_once(transport: Transport) -> None:
    """A command that receives in its main thread can be ended with Ctrl-C."""
    over = threading.Event()

    handled: list[int] = []

    def handle(number: int, _: object) -> None:
        handled.append(number)
        if len(handled) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with connected(transport, silent_after(10, over)) as wire:
            for delay_s in (0.2, 0.4):
                threading.Timer(delay_s, signal.pthread_kill, [
                    threading.main_thread().ident, signal.SIGUSR1
                ]).start()  # fmt: skip
            began_s = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                take(wire, 500_000)
            over.set()
            assert time.monotonic() - began_s < 5
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(handled) == 2


def test_signals_do_not_lengthen_the_wait(transport: Transport) -> None:
    over = threading.Event()

    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with connected(transport, silent_after(10, over), timeout_s=0.5) as wire:
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            began_s = time.monotonic()
            with pytest.raises(TimeoutError):
                take(wire, 500_000)
            over.set()
            assert time.monotonic() - began_s < 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_tls_is_left_to_its_own_functions(certificates: tuple[Path, Path, Path]) -> None:
    """Of another connection, without a socket, or no TLS at all."""
    with connected(certificates, lambda wire: wire.sendall(DATA)) as wire, socket.socket() as other:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        without = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="s3.test")
        into = memoryview(bytearray(1000))
        assert receive(other.fileno(), tls_of(wire), into, 1.0) == (0, None)
        assert receive(wire.fileno(), without._sslobj, into, 1.0) == (0, None)  # type: ignore[attr-defined]
        assert receive(wire.fileno(), object(), into, 1.0) == (0, None)
        assert wire.recv(5) == DATA[:5]


def test_memory_that_cannot_be_written_is_refused(transport: Transport) -> None:
    with connected(transport, lambda wire: wire.sendall(DATA)) as wire:
        with pytest.raises(TypeError):
            receive(wire.fileno(), tls_of(wire), memoryview(b"0123"), 1.0)
        with pytest.raises((TypeError, BufferError)):
            receive(wire.fileno(), tls_of(wire), memoryview(bytearray(8))[::2], 1.0)
        assert take(wire, 100) == (DATA[:100], None)


def test_a_closed_connection_is_told() -> None:
    with socket.socket() as wire:
        number = os.dup(wire.fileno())
        os.close(number)
        count, why = receive(number, None, memoryview(bytearray(10)), 1.0)
    assert (count, why) == (0, "Bad file descriptor")


@pytest.mark.parametrize(
    ("endpoint", "known", "state", "words"),
    [
        ("https://s3.test", True, Outcome.OK, ""),
        ("https://s3.test", False, Outcome.WARNING, "more processor time"),
        ("http://s3.test", False, Outcome.WARNING, "not encrypted"),
        ("http://127.0.0.1:9000", False, Outcome.OK, ""),
    ],
)
def test_doctor_tells_what_an_endpoint_costs(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, known: bool, state: Outcome, words: str
) -> None:
    monkeypatch.setattr(checks, "knows_tls", lambda: known)
    found = checks._transport(endpoint)
    assert (found.what, found.state) == ("endpoint", state)
    assert words in found.words
    assert bool(found.advice) is (state is Outcome.WARNING)
