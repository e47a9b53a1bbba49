"""S3 does not answer while a volume is being mounted: calls, events and deleted pods."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from mounting import shell
from nodes import POD, SECRETS, TestNode, capability, refused, wait_for
from s3 import S3

from csi import csi_pb2

pytestmark = pytest.mark.fuse

# kubelet's own time for a call.
KUBELET_S = 120


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("quiet", {"m/file": b"content"})


@pytest.fixture
def context(node: TestNode) -> dict[str, str]:
    return node.context("s3://quiet/m")


def stage(node: TestNode, context: dict[str, str], key: str = "testing") -> None:
    """One call, as kubelet makes it."""
    request = csi_pb2.NodeStageVolumeRequest(
        volume_id="vol",
        staging_target_path=str(node.staging("vol")),
        volume_capability=capability(),
        secrets={**SECRETS, "accessKeyId": key},
        volume_context=context,
    )
    node.stub.NodeStageVolume(request, timeout=KUBELET_S)


def publish(node: TestNode, context: dict[str, str]) -> Path:
    """One call for a volume whose secret comes with the pod."""
    target = node.target("vol")
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id="vol",
        staging_target_path=str(node.staging("vol")),
        target_path=str(target),
        volume_capability=capability(),
        volume_context={**POD, **context},
        secrets=SECRETS,
    )
    node.stub.NodePublishVolume(request, timeout=KUBELET_S)
    return target


def test_an_event_comes_early_and_the_pod_starts_when_s3_answers(
    node: TestNode, context: dict[str, str], s3: S3
) -> None:
    """The same sentence each time, so that it is one event with a count."""
    s3.fault(r"GET /quiet", "hang", 1000, seconds=600)
    told = [refused(lambda: stage(node, context)) for _ in range(2)]
    assert told[0] == told[1]
    code, message = told[0]
    assert code == "UNAVAILABLE", "a code after which kubelet calls again and cleans up"
    assert message.startswith("s3://quiet/m: is not mounted yet: S3 has not answered")
    wait_for(lambda: len(node.workers()) == 1)  # the second call joins the start that goes on
    s3.forget()
    node.stage("vol", context)
    assert shell("cat file", node.publish("vol", context)).stdout == "content"
    node.unpublish("vol")
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_volume_that_never_started_is_removed_at_once(
    node: TestNode, context: dict[str, str], s3: S3
) -> None:
    """Its pod is deleted while S3 is silent, and S3 stays so."""
    s3.fault(r"GET /quiet", "hang", 1000, seconds=600)
    node.stage("vol", context, secrets={})
    assert refused(lambda: publish(node, context))[0] == "UNAVAILABLE"
    node.unpublish("vol")
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_volume_starts_without_another_call(
    node: TestNode, context: dict[str, str], s3: S3
) -> None:
    """kubelet pauses for up to two minutes between calls: the next one finds it ready."""
    s3.fault(r"GET /quiet", "hang", 1000, seconds=600)
    node.stage("vol", context, secrets={})
    assert refused(lambda: publish(node, context))[0] == "UNAVAILABLE"
    s3.forget()
    wait_for(lambda: any("state/mounts" in path for path in node.mounts()), 60)
    assert shell("cat file", publish(node, context)).stdout == "content"


def test_a_refused_connection_is_named_at_once(node: TestNode) -> None:
    context = {"source": "s3://quiet/m", "endpointUrl": "http://127.0.0.1:9"}
    code, message = refused(lambda: stage(node, context))
    assert (code, "127.0.0.1:9" in message) == ("UNAVAILABLE", True), message
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_corrected_secret_replaces_a_start_that_hangs(
    node: TestNode, context: dict[str, str], s3: S3
) -> None:
    s3.fault(r"GET /quiet", "hang", 1000, seconds=600)
    assert refused(lambda: stage(node, context, "first"))[0] == "UNAVAILABLE"
    s3.forget()
    s3.let_in("second")
    deadline = time.monotonic() + 60
    while True:
        try:
            stage(node, context, "second")
            break
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
            assert time.monotonic() < deadline
    assert shell("cat file", node.publish("vol", context)).stdout == "content"


@pytest.mark.parametrize("restart", [False, True], ids=["", "after a restart"])
def test_a_start_that_is_refused_later_leaves_nothing(
    node: TestNode, context: dict[str, str], s3: S3, restart: bool
) -> None:
    """kubelet takes nothing away after a code that says that it failed."""
    s3.fault(r"GET /quiet", "hang", 1000, seconds=600)
    assert refused(lambda: stage(node, context))[0] == "UNAVAILABLE"
    if restart:
        node.kill_plugin()
        node.start_plugin()
    s3.forget()
    s3.fault(r"GET /quiet", "status", 1000, status=403, code="AccessDenied")

    def is_refused() -> bool:
        return refused(lambda: stage(node, context))[0] == "PERMISSION_DENIED"

    wait_for(is_refused, 90)
    assert node.leftovers() == []
