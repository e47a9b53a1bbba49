"""The gRPC server: codes, log lines, sockets, ends."""

from __future__ import annotations

import logging
import re
import socket
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from mounting import python

from csi import csi_pb2
from csi.csi_pb2_grpc import (
    ControllerServicer,
    ControllerStub,
    IdentityStub,
    add_ControllerServicer_to_server,
    add_IdentityServicer_to_server,
)
from csi.errors import InvalidArgumentError
from csi.health import HealthServer
from csi.identity import Identity
from csi.server import Server
from lazyfs.errors import AccessDeniedError, DaemonError, MountError, OptionError, UnavailableError
from lazyfs.handover.keeper import KeeperError
from lazyfs.log import TextFormatter

SECRET = "wJalrXUtnFEMI"


class Failing(ControllerServicer):
    """Deletes volumes by raising what a test says."""

    error: BaseException | None = None

    def DeleteVolume(self, request: Any, context: Any) -> csi_pb2.DeleteVolumeResponse:
        if self.error is not None:
            raise self.error
        return csi_pb2.DeleteVolumeResponse()


@pytest.fixture
def failing() -> Failing:
    return Failing()


@pytest.fixture
def channel(tmp_path: Path, failing: Failing) -> Iterator[grpc.Channel]:
    """A channel to a running server."""
    identity = Identity("csi.test", [])
    server = Server(
        f"unix://{tmp_path}/csi.sock",
        [
            lambda it: add_IdentityServicer_to_server(identity, it),
            lambda it: add_ControllerServicer_to_server(failing, it),
        ],
    )
    server.start()
    with grpc.insecure_channel(f"unix:{tmp_path}/csi.sock") as channel:
        yield channel
    server.stop()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InvalidArgumentError("name is missing"), "INVALID_ARGUMENT", "name is missing"),
        (AccessDeniedError("s3://b: no"), "PERMISSION_DENIED", "s3://b: no"),
        (UnavailableError("s3://b: away"), "UNAVAILABLE", "s3://b: away"),
        (KeeperError("no keeper"), "UNAVAILABLE", "no keeper"),
        (MountError("/mnt: odd"), "INTERNAL", "/mnt: odd"),
        (DaemonError("s3://b: no", 1, "NoSuchBucketError"), "NOT_FOUND", "s3://b: no"),
        (ValueError(SECRET), "INTERNAL", r"a fault of the plugin \(ValueError\)"),
    ],
)
def test_errors_have_their_code(
    channel: grpc.Channel, failing: Failing, error: Exception, code: str, said: str
) -> None:
    failing.error = error
    with pytest.raises(grpc.RpcError) as caught:
        ControllerStub(channel).DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id="v"), timeout=60)
    assert caught.value.code().name == code
    assert re.search(said, caught.value.details())
    assert SECRET not in caught.value.details()


def test_unknown_rpcs(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ControllerStub(channel).GetCapacity(csi_pb2.GetCapacityRequest(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "this driver has no GetCapacity"


def test_each_rpc_is_one_line_without_secrets(
    channel: grpc.Channel, failing: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "csi.server")
    caplog.handler.setFormatter(TextFormatter())
    request = csi_pb2.DeleteVolumeRequest(volume_id="pvc\n1", secrets={"secretAccessKey": SECRET})
    ControllerStub(channel).DeleteVolume(request, timeout=60)
    failing.error = InvalidArgumentError("volume_id is wrong")
    with pytest.raises(grpc.RpcError):
        ControllerStub(channel).DeleteVolume(request, timeout=60)
    good, bad = caplog.text.splitlines()
    about = r"\[rpc=([0-9a-f]{4})-(\d+) volume=pvc\\n1\]"
    first = re.search(rf"INFO csi.server: DeleteVolume: OK in [\d.]+ s {about}$", good)
    second = re.search(
        rf"csi.server: DeleteVolume: INVALID_ARGUMENT in [\d.]+ s: volume_id is wrong {about}$", bad
    )
    assert first and second
    assert (first[1], int(first[2]) + 1) == (second[1], int(second[2]))
    assert SECRET not in caplog.text


def test_the_socket_is_for_its_user_alone(channel: grpc.Channel, tmp_path: Path) -> None:
    IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=60)
    assert stat.S_IMODE((tmp_path / "csi.sock").stat().st_mode) & 0o077 == 0


def test_a_second_plugin_and_other_files_are_refused(channel: grpc.Channel, tmp_path: Path) -> None:
    IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=60)
    (tmp_path / "file").write_text("precious")
    for endpoint, said in (
        (f"unix://{tmp_path}/csi.sock", "another plugin answers there"),
        (f"unix://{tmp_path}/file", "is not a socket"),
        ("tcp://127.0.0.1:1", "unix:///PATH"),
        (f"unix:///{'x' * 120}", "longer than"),
    ):
        with pytest.raises(OptionError, match=said):
            Server(endpoint, [])
    assert (tmp_path / "file").read_text() == "precious"


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    identity = Identity("csi.test", [])
    server = Server(str(path), [lambda it: add_IdentityServicer_to_server(identity, it)])
    server.start()
    with grpc.insecure_channel(f"unix:{path}") as channel:
        IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=60)
    server.stop()


def test_an_rpc_that_runs_may_finish(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(ControllerServicer):
        def DeleteVolume(self, request: Any, context: Any) -> csi_pb2.DeleteVolumeResponse:
            entered.set()
            leave.wait(10)
            return csi_pb2.DeleteVolumeResponse()

    server = Server(
        f"{tmp_path}/csi.sock", [lambda it: add_ControllerServicer_to_server(Slow(), it)]
    )
    server.start()
    with grpc.insecure_channel(f"unix:{tmp_path}/csi.sock") as channel:
        call = ControllerStub(channel).DeleteVolume.future(
            csi_pb2.DeleteVolumeRequest(volume_id="v"), timeout=60
        )
        assert entered.wait(10)
        ending = threading.Thread(target=server.stop)
        ending.start()
        leave.set()
        assert call.result() == csi_pb2.DeleteVolumeResponse()
        ending.join(10)


def test_health_pages() -> None:
    wrong: list[str] = []

    def check() -> None:
        if wrong:
            raise KeeperError(wrong[0])

    server = HealthServer(":0", [check], lambda: "of_a_mount 1\n")
    server.start()

    def get(page: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{page}", timeout=60) as got:
                return got.status, got.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert get("/healthz") == (200, "ok\n")
    assert get("/readyz") == (200, "ok\n")
    wrong.append("no keeper at /run/x")
    assert get("/healthz") == (200, "ok\n")
    assert get("/readyz") == (503, "no keeper at /run/x\n")
    metrics = get("/metrics")[1]
    assert "lazyfs_csi_rpc_seconds" in metrics and metrics.endswith("\nof_a_mount 1\n")
    assert get("/secrets")[0] == 404
    server.stop()
    with pytest.raises(OptionError, match="HOST:PORT"):
        HealthServer("9808", [])


# Told to end at each line of Python that the main thread goes through to wait for that, or soon.
TOLD_TO_END = """
import signal, sys
from csi.server import Server

class Told(Server):
    def start(self):
        super().start()
        signal.signal(signal.SIGALRM, self.tell)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        sys.settrace(self.trace)

    def trace(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.tell()
        return self.trace

    def tell(self, *_):
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.left = 0
        signal.raise_signal(signal.SIGTERM)

for line in range(1, 30):
    server = Told(sys.argv[1], [])
    server.left = line
    server.serve()
"""


def test_the_plugin_ends_on_sigterm_at_any_time(tmp_path: Path) -> None:
    """A signal may come while what waits for it holds a lock."""
    python(TOLD_TO_END, f"unix://{tmp_path}/s", timeout_s=100)
