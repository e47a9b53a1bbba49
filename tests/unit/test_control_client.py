"""What a worker that was taken over can answer at its control socket."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from csi import metrics
from csi.daemon import Daemon
from csi.daemon_users import Served
from lazyfs.control.client import ControlClient, ControlError
from lazyfs.process.mount_spec import MountSpec

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def worker() -> Iterator[Callable[[Callable[[socket.socket], None]], Path]]:
    """Answers each client with a function, at the returned socket."""
    directory = Path(tempfile.mkdtemp(prefix="lazyfs-"))  # paths of sockets are short
    listeners: list[socket.socket] = []

    def listen(answer: Callable[[socket.socket], None]) -> Path:
        path = directory / f"{len(listeners)}.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with closing(connection), suppress(OSError):
                    connection.recv(1 << 16)
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        return path

    yield listen
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    shutil.rmtree(directory)


def says(body: bytes) -> Callable[[socket.socket], None]:
    head = OK + b"Content-Length: %d\r\n\r\n" % len(body)
    return lambda connection: connection.sendall(head + body)


def endless(connection: socket.socket) -> None:
    connection.sendall(OK + b"\r\n")
    while True:
        connection.sendall(b" " * (1 << 20))


def dripping(connection: socket.socket) -> None:
    connection.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("came", [b"", b"1", b'{"same": true'])
def test_an_answer_that_is_cut_off_is_none(worker: Callable[..., Path], came: bytes) -> None:
    def dies(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: 20\r\n\r\n" + came)

    with pytest.raises(ControlError, match="ended while it answered"):
        ControlClient(worker(dies)).get("/status")


def test_an_answer_is_read(worker: Callable[..., Path]) -> None:
    assert ControlClient(worker(says(b'{"a": 1}'))).get("/status") == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (endless, "too long"),
        (dripping, "timed out"),
        (says(b"[" * 100_000), "not JSON"),
        (says(b"nothing"), "not JSON"),
        (says(b"\xff\xff"), "not JSON"),
    ],
)
def test_an_answer_has_a_size_and_a_time(
    worker: Callable[..., Path], answer: Callable[[socket.socket], None], complaint: str
) -> None:
    client = ControlClient(worker(answer), 0.5 if answer is dripping else 60, 4 << 20)
    with pytest.raises(ControlError, match=complaint):
        client.get("/status")


@pytest.mark.parametrize(
    "body",
    [
        b"null", b"[1]", b'"text"', b'{"lazyfs_up": 1}', b'{"lazyfs_up": [1]}',
        b'{"lazyfs_up": [[{}, "x"]]}', b'{"lazyfs_up": [[{}, [1]]]}',
    ],
)  # fmt: skip
def test_metrics_of_others_do_not_depend_on_one_worker(
    worker: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    sockets = {"good": worker(says(b'{"lazyfs_up": [[{}, 1]]}')), "bad": worker(says(body))}
    monkeypatch.setattr(metrics, "control_socket", lambda mountpoint: sockets[mountpoint.name])
    served = {
        Daemon(name, Path(name), MountSpec("s3://b", name), False): Served({name}, set())
        for name in sockets
    }
    text = metrics.mount_metrics(SimpleNamespace(served=lambda: served))  # type: ignore[arg-type]
    assert 'lazyfs_up{volume="good"} 1.0' in text
    assert 'lazyfs_up{volume="bad"} 0.0' in text
