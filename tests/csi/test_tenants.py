"""Pod authors who try what is not theirs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from nodes import TestNode, refused
from s3 import S3

pytestmark = pytest.mark.fuse

INLINE = {"csi.storage.k8s.io/ephemeral": "true", "noSignRequest": "true"}


class Inside:
    """Something at a port of the node that is not for pods; it answers everybody the same."""

    def __init__(self, says: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._says = says
        self.connections = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.recv(4096)
                connection.sendall(self._says)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def inside() -> Iterator[Inside]:
    with closing(Inside(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")) as it:
        yield it


def publish(node: TestNode, endpoint: str, source: str = "s3://internal/m") -> tuple[str, str]:
    """The code and the message that a pod's event has."""
    context = {"source": source, "endpointUrl": endpoint, "ioTimeout": "1s", **INLINE}
    return refused(lambda: node.publish("csi-1", context, staging_target_path=""))


def test_a_pod_does_not_choose_the_endpoint(node: TestNode, inside: Inside, s3: S3) -> None:
    code, message = publish(node, f"{inside.url}/latest/meta-data")
    assert code == "INVALID_ARGUMENT" and "allowedEndpoints" in message and s3.url in message
    assert inside.connections == 0 and node.leftovers() == []


def test_any_endpoint_is_none_of_the_node(
    make_node: Callable[..., TestNode], inside: Inside
) -> None:
    node = make_node("--allowed-endpoint=any")
    port = inside.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"):
        code, message = publish(node, f"http://{host}:{port}")
        assert code == "FAILED_PRECONDITION", message
        assert "is not asked" in message and "secret" not in message
    assert inside.connections == 0 and node.leftovers() == []
