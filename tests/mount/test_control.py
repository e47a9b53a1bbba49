"""The control socket of a worker, with real mounts."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from mounting import RUNTIME_DIRECTORY, Mounted, shell
from s3 import S3

from lazyfs.control.client import ControlClient, ControlError
from lazyfs.store.credentials import StaticCredentials

pytestmark = pytest.mark.fuse
CONTENT = os.urandom(3_000_000)


@pytest.fixture(autouse=True, scope="module")
def _objects(server: S3) -> None:
    server.put("control", {"m/file": CONTENT, "m/model.safetensors": bytes(100)})


def socket_of(mounted: Mounted) -> Path:
    """Beside the record of the mount; those of mounts that were killed may lie there as well."""
    records = Path(RUNTIME_DIRECTORY).glob("*.json")
    (record,) = (
        path for path in records if json.loads(path.read_text())["mountpoint"] == str(mounted.path)
    )
    return record.with_suffix(".sock")


def test_status_says_what_happened(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://control/m", "--prefetch=off")
    assert shell("cksum file", mounted.path).returncode == 0
    status = ControlClient(socket_of(mounted)).get("/status")
    assert status["source"] == "s3://control/m"
    assert status["pid"] == mounted.worker
    assert status["fetched_bytes"] == len(CONTENT)
    assert status["trouble"] is None


def test_status_reports_errors(mount: Callable[..., Mounted], server: S3) -> None:
    mounted = mount("s3://control/m", "--prefetch=off", "--io-timeout=1s", "--cache-dir=none")
    client = ControlClient(socket_of(mounted))
    server.put("control", {"m/file": CONTENT[::-1]})
    assert "Stale" in shell("cat file", mounted.path).stderr
    assert "s3://control/m/file: listed with the ETag" in client.get("/status")["trouble"]


def test_only_its_user_may_ask(mount: Callable[..., Mounted]) -> None:
    path = socket_of(mount("s3://control/m"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if os.geteuid() == 0:
        path.chmod(0o666)
        path.parent.chmod(0o711)
        assert _ask_as_nobody(path) == b"connected"


def _ask_as_nobody(path: Path) -> bytes:
    child, parent = socket.socketpair()
    if os.fork() == 0:
        try:
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                child.sendall(b"connected")
                connection.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
                child.sendall(connection.recv(1000))
        finally:
            os._exit(0)
    child.close()
    os.wait()
    answer = parent.recv(1000)
    parent.close()
    return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (("GET", "/nothing", None), 404),
        (("PUT", "/credentials", b"not json, but a secret"), 400),
        (("PUT", "/credentials", b'{"secret": "value"}'), 400),
        (("PUT", "/credentials", b"[1]"), 400),
        (("PUT", "/credentials", b"x" * 70_000), 413),
    ],
)
def test_bad_requests_are_answered(
    mount: Callable[..., Mounted], request_: tuple[str, str, bytes | None], status: int
) -> None:
    connection = http.client.HTTPConnection("lazyfs")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(socket_of(mount("s3://control/m"))))
    connection.request(*request_)
    response = connection.getresponse()
    assert response.status == status
    answer = response.read()
    assert b"error" in answer
    assert b"secret" not in answer.replace(b"['secret']", b"")
    connection.close()


def test_head_requests_are_answered(mount: Callable[..., Mounted]) -> None:
    """As `curl -I` and probes ask; such a request ended the worker once."""
    mounted = mount("s3://control/m")
    worker = mounted.worker
    for path, status in (("/metrics", 200), ("/nothing", 404)):
        connection = http.client.HTTPConnection("lazyfs")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(socket_of(mounted)))
        connection.request("HEAD", path)
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, b"")
        assert int(response.headers["Content-Length"]) > 0
        connection.close()
    assert ControlClient(socket_of(mounted)).get("/status")["pid"] == worker


def test_credentials_that_botocore_found_are_not_replaced(mount: Callable[..., Mounted]) -> None:
    client = ControlClient(socket_of(mount("s3://control/m")))
    with pytest.raises(ControlError, match="mounted without credentials of its own"):
        client.put("/credentials", asdict(StaticCredentials("a", "b")))


def test_the_socket_goes_with_the_mount(mount: Callable[..., Mounted]) -> None:
    mounted = mount("s3://control/m")
    path = socket_of(mounted)
    mounted.end()
    assert not path.exists()
