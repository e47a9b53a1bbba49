"""The node plugin registers itself with an imitated kubelet, over real sockets."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from pathlib import Path

import grpc
import kubelet
import pytest
from nodes import TestNode

from csi import pluginregistration_pb2 as api
from csi.pluginregistration_pb2_grpc import RegistrationStub

pytestmark = pytest.mark.fuse


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Registered:
    """A node whose plugin is to register, and what its health page says."""

    def __init__(self, make_node: Callable[..., TestNode], directory: Path) -> None:
        self.registry = directory
        self.port = free_port()
        self.node = make_node(
            f"--registration-dir={directory}", f"--http-address=127.0.0.1:{self.port}"
        )
        self.socket = directory / "csi.lazyfs.io-reg.sock"

    def ready(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/readyz")
        return connection.getresponse().read().decode().strip()

    def notify(self, registered: bool, error: str = "") -> None:
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            status = api.RegistrationStatus(plugin_registered=registered, error=error)
            RegistrationStub(channel).NotifyRegistrationStatus(status, timeout=5)


@pytest.fixture
def registered(make_node: Callable[..., TestNode], short_path: Path) -> Registered:
    directory = short_path / "plugins_registry"
    directory.mkdir()
    return Registered(make_node, directory)


def test_kubelet_registers_the_driver(registered: Registered) -> None:
    """It is ready when kubelet has taken it, and a kubelet that starts again finds it there."""
    assert "kubelet has not asked" in registered.ready()
    for _ in range(2):
        endpoint = kubelet.register(registered.registry, "node-1")
        assert endpoint == str(registered.node.plugin.socket)
        assert registered.ready() == "ok"
    registered.node.plugin.wait_for_log("kubelet registered the driver csi.lazyfs.io")


def test_a_refusal_says_why(registered: Registered) -> None:
    why = "Another driver with the same name is already registered"
    registered.notify(False, why)
    assert why in registered.ready()
    registered.node.plugin.wait_for_log(why)
    registered.notify(True)
    assert registered.ready() == "ok"


def test_a_socket_that_is_removed_is_noticed(registered: Registered) -> None:
    kubelet.register(registered.registry, "node-1")
    registered.socket.unlink()
    assert f"{registered.socket} was removed" in registered.ready()


def test_the_socket_goes_with_the_plugin_and_a_stale_one_is_replaced(
    registered: Registered,
) -> None:
    registered.node.kill_plugin()
    assert registered.socket.is_socket(), "nobody could take it away"
    registered.node.start_plugin()
    kubelet.register(registered.registry, "node-1")
    registered.node.plugin.end()
    assert not registered.socket.exists(), "kubelet forgets a driver whose socket goes"
    registered.node.start_plugin()


def test_a_driver_is_registered_by_its_name(
    make_node: Callable[..., TestNode], short_path: Path
) -> None:
    directory = short_path / "plugins_registry"
    make_node(f"--registration-dir={directory}", "--driver-name=second.example.com")
    kubelet.register(directory, "node-1")
    assert [path.name for path in directory.iterdir()] == ["second.example.com-reg.sock"]
