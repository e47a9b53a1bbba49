"""Pod authors cannot reach what belongs to others."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
from mounting import shell
from nodes import SECRETS, TestNode, capability, refused, wait_for
from s3 import S3

from csi import csi_pb2
from csi.parameters import CLAIM_NAMESPACE
from csi.server import THREADS
from csi.waiting import MOST, MOST_OF_ONE, SHORT_S, WaitingCalls

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


def test_any_endpoint_excludes_addresses_of_the_node(
    make_node: Callable[..., TestNode], inside: Inside
) -> None:
    node = make_node("--allowed-endpoint=any")
    port = inside.url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"):
        code, message = publish(node, f"http://{host}:{port}")
        assert code == "FAILED_PRECONDITION", message
        assert "are not contacted" in message and "secret" not in message
    assert inside.connections == 0 and node.leftovers() == []


def of(namespace: str, account: str = "default") -> dict[str, str]:
    """What kubelet says of a pod."""
    return {
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.namespace": namespace,
        "csi.storage.k8s.io/pod.name": f"pod-of-{namespace}",
        "csi.storage.k8s.io/serviceAccount.name": account,
    }


def keys(name: str) -> dict[str, str]:
    return {"accessKeyId": name, "secretAccessKey": "secret"}


def test_equal_keys_of_two_tenants_share_no_daemon(node: TestNode, s3: S3) -> None:
    s3.put("common", {"m/first": b"first", "m/second": b"second"})
    context = node.context("s3://common/m", prefetch="off", ioTimeout="2s")

    def put(volume: str, whose: dict[str, str], key: str) -> Path:
        return node.publish(
            volume, context | whose, volume, staging_target_path="", secrets=keys(key)
        )

    ours, theirs = put("csi-1", of("team-a"), "common"), put("csi-2", of("team-b"), "common")
    put("csi-3", of("team-b"), "common")
    wait_for(lambda: len(node.workers()) == 2)  # team-b's pods share one
    # Team B has another key; and that is the only one that works.
    s3.let_in("new")
    put("csi-2", of("team-b"), "new")
    assert shell("cat first", theirs).stdout == "first"
    assert shell("cat first", ours).returncode != 0
    # Team A's key works again, and B's does not.
    s3.let_in("common")
    assert shell("cat second", ours).stdout == "second"
    s3.forget()
    for volume in ("csi-1", "csi-2", "csi-3"):
        node.unpublish(volume, volume)
    assert node.leftovers() == []


def test_many_waiting_volumes_leave_the_plugin_to_others(
    make_node: Callable[..., TestNode], s3: S3
) -> None:
    """More volumes of one namespace than there are threads, none of which gets an answer."""
    s3.put("quick", {"m/file": b"content"})
    with (
        socket.create_server(("127.0.0.1", 0), backlog=256) as silent,
        ThreadPoolExecutor(THREADS + 6) as kubelets,
    ):
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        node = make_node(f"--allowed-endpoint={endpoint}")
        names = [f"slow-{number}" for number in range(THREADS + 6)]
        context = {"source": "s3://slow/m", "endpointUrl": endpoint, **INLINE, **of("greedy")}

        def publish(name: str) -> None:
            request = csi_pb2.NodePublishVolumeRequest(
                volume_id=name,
                target_path=str(node.target(name)),
                volume_capability=capability(),
                volume_context={**context, "blockSize": f"{1 << int(name[5:]) % 3}MiB"},
            )
            node.stub.NodePublishVolume(request, timeout=60)

        calls = [kubelets.submit(publish, name) for name in names]
        # Those that may not wait are answered while others still do.
        first = next(as_completed(calls, 30)).exception()
        assert isinstance(first, grpc.RpcError)
        node.plugin.identity.Probe(csi_pb2.ProbeRequest(), timeout=60)
        quick = node.context("s3://quick/m") | of("modest")
        target = node.publish("quick", quick, staging_target_path="", secrets=SECRETS)
        assert shell("cat file", target).stdout == "content"
        assert all(isinstance(call.exception(60), grpc.RpcError) for call in calls)
        for name in (*names, "quick"):
            node.unpublish(name)
    assert node.leftovers() == []


def test_which_calls_may_wait() -> None:
    calls = WaitingCalls()
    with ExitStack() as stack:
        waits = [stack.enter_context(calls.one_of("greedy")) for _ in range(MOST_OF_ONE + 1)]
        assert waits == [math.inf] * MOST_OF_ONE + [SHORT_S]
        assert stack.enter_context(calls.one_of("modest")) == math.inf
        others = [stack.enter_context(calls.one_of(f"n-{n}")) for n in range(MOST)]
        assert others.count(math.inf) == MOST - MOST_OF_ONE - 1
    with calls.one_of("greedy") as at_most_s:
        assert at_most_s == math.inf


@pytest.mark.usefixtures("for_all")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_workers_of_two_tenants_are_two_users(make_node: Callable[..., TestNode], s3: S3) -> None:
    """Each without rights; and the cache that they share is nobody else's."""
    s3.put("two", {"m/file": b"content"})
    directory = Path(tempfile.mkdtemp(prefix="lazyfs-"))
    try:
        directory.chmod(0o755)
        node = make_node(f"--cache-dir={directory}/cache")
        for team in ("a", "b"):
            target = node.publish(
                f"csi-{team}", node.context("s3://two/m") | of(team), f"csi-{team}",
                staging_target_path="", secrets=keys("testing"),
            )  # fmt: skip
            assert shell("cat file", target).stdout == "content"
        found = [
            dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(), re.MULTILINE))
            for pid in node.workers()
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
        assert len({status["Uid"] for status in found}) == 2
        assert {status["Uid"] for status in found}.isdisjoint({"0\t0\t0\t0"})
        for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
            assert {int(status[name], 16) for status in found} == {0}
        assert {(s["NoNewPrivs"], s["Seccomp"]) for s in found} == {("1", "2")}
        for team in ("a", "b"):
            node.unpublish(f"csi-{team}", f"csi-{team}")
        assert node.leftovers() == []
    finally:
        shutil.rmtree(directory)


def test_claims_of_a_namespace_are_bounded_before_a_pod_uses_them(
    make_node: Callable[..., TestNode], s3: S3
) -> None:
    s3.put("claims", {"m/file": b"content"})
    node = make_node("--max-volumes-per-namespace=3", "--max-daemons-per-namespace=2")

    def stage(volume: str, namespace: str, **options: str) -> None:
        context = node.context("s3://claims/m", prefetch="off", **options)
        node.stage(volume, context | {CLAIM_NAMESPACE: namespace})

    stage("greedy-0", "greedy")
    stage("greedy-1", "greedy", blockSize="1MiB")
    code, message = refused(lambda: stage("greedy-2", "greedy", blockSize="2MiB"))
    assert code == "RESOURCE_EXHAUSTED" and "--max-daemons-per-namespace" in message
    stage("greedy-2", "greedy")
    code, message = refused(lambda: stage("greedy-3", "greedy"))
    assert code == "RESOURCE_EXHAUSTED" and "--max-volumes-per-namespace" in message
    stage("modest-0", "modest", blockSize="2MiB")
    node.unstage("greedy-1")
    stage("greedy-3", "greedy", blockSize="4MiB")
    for volume in ("greedy-0", "greedy-2", "greedy-3", "modest-0"):
        node.unstage(volume)
    assert node.leftovers() == []


def test_one_namespace_does_not_take_the_node(make_node: Callable[..., TestNode], s3: S3) -> None:
    """Neither with volumes nor with daemons; others go on, and a place can be had again."""
    s3.put("bounds", {"m/file": b"content"})
    node = make_node("--max-volumes-per-namespace=4", "--max-daemons-per-namespace=2")

    def publish(volume: str, namespace: str, **options: str) -> None:
        context = node.context("s3://bounds/m", prefetch="off", **options) | of(namespace)
        target = node.publish(
            volume, context, volume, staging_target_path="", secrets=keys("testing")
        )
        assert shell("cat file", target).stdout == "content"

    publish("greedy-0", "greedy")
    publish("greedy-1", "greedy", blockSize="1MiB")
    code, message = refused(lambda: publish("greedy-2", "greedy", blockSize="2MiB"))
    assert code == "RESOURCE_EXHAUSTED" and "--max-daemons-per-namespace" in message
    assert len(node.workers()) == 2
    publish("greedy-2", "greedy")
    publish("greedy-3", "greedy")
    for _ in range(2):
        code, message = refused(lambda: publish("greedy-4", "greedy"))
        assert code == "RESOURCE_EXHAUSTED" and "--max-volumes-per-namespace" in message
    publish("greedy-3", "greedy")  # kubelet repeats calls
    publish("modest-0", "modest", blockSize="4MiB")
    node.kill_plugin()
    node.start_plugin()
    assert refused(lambda: publish("greedy-4", "greedy"))[0] == "RESOURCE_EXHAUSTED"
    node.unpublish("greedy-1", "greedy-1")
    publish("greedy-4", "greedy", blockSize="2MiB")
    assert refused(lambda: publish("greedy-5", "greedy"))[0] == "RESOURCE_EXHAUSTED"
    for volume in ("greedy-0", "greedy-2", "greedy-3", "greedy-4", "modest-0"):
        node.unpublish(volume, volume)
    assert node.leftovers() == []
