"""The metrics that Prometheus scrapes from a node plugin."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable

import pytest
from nodes import TestNode
from ports import free_port
from s3 import S3

pytestmark = pytest.mark.fuse


def scrape(port: int) -> dict[str, float]:
    """All samples, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def test_mounts_and_rpcs(make_node: Callable[..., TestNode], s3: S3) -> None:
    s3.put("measured", {"a/x.bin": b"x" * 1000, "b/y.bin": b"y" * 2000})
    port = free_port()
    node = make_node(f"--http-address=127.0.0.1:{port}")
    assert not any(name.startswith("lazyfs_up") for name in scrape(port))
    # Two volumes of one source share a daemon.
    for volume, prefix in (("pvc-1", "a"), ("pvc-2", "a"), ("pvc-3", "b")):
        node.stage(volume, node.context(f"s3://measured/{prefix}"))
    found = scrape(port)
    assert found['lazyfs_size_bytes{volume="pvc-1,pvc-2"}'] == 1000
    assert not any(name.startswith("lazyfs_volume_pod_info") for name in found)
    assert found['lazyfs_size_bytes{volume="pvc-3"}'] == 2000
    staged = 'lazyfs_csi_rpc_seconds_count{code="OK",rpc="NodeStageVolume"}'
    assert found[staged] == 3
    stopped = node.workers()
    for worker in stopped:
        os.kill(worker, signal.SIGSTOP)
    try:
        found = scrape(port)
    finally:
        for worker in stopped:
            os.kill(worker, signal.SIGCONT)
    assert found['lazyfs_up{volume="pvc-3"}'] == 0
    assert 'lazyfs_size_bytes{volume="pvc-3"}' not in found


def pods(port: int) -> set[tuple[str, str, str]]:
    """Volume, namespace and pod of all pods that use volumes."""
    pattern = r'lazyfs_volume_pod_info{namespace="(.*)",pod="(.*)",volume="(.*)"}'
    found = [re.fullmatch(pattern, name) for name, value in scrape(port).items() if value == 1]
    return {(one[3], one[1], one[2]) for one in found if one}


def test_metrics_name_the_pods_of_a_volume(make_node: Callable[..., TestNode], s3: S3) -> None:
    s3.put("shared", {"a/x.bin": b"x" * 1000})
    port = free_port()
    node = make_node(f"--http-address=127.0.0.1:{port}")
    context = node.context("s3://shared/a")
    for volume in ("pvc-1", "pvc-2"):
        node.stage(volume, context)
    assert pods(port) == set()
    for volume, namespace, pod in (("pvc-1", "red", "a-0"), ("pvc-1", "red", "a-1"),
                                   ("pvc-2", "blue", "b-0")):  # fmt: skip
        node.publish(volume, of_pod(context, namespace, pod), pod)
    everybody = {("pvc-1,pvc-2", "red", "a-0"), ("pvc-1,pvc-2", "red", "a-1"),
                 ("pvc-1,pvc-2", "blue", "b-0")}  # fmt: skip
    assert pods(port) == everybody
    node.kill_plugin()
    node.start_plugin()
    assert pods(port) == everybody
    node.unpublish("pvc-1", "a-1")
    assert pods(port) == everybody - {("pvc-1,pvc-2", "red", "a-1")}
    for volume, pod in (("pvc-1", "a-0"), ("pvc-2", "b-0")):
        node.unpublish(volume, pod)
    assert pods(port) == set()


def test_places_recorded_without_pods(make_node: Callable[..., TestNode], s3: S3) -> None:
    s3.put("shared", {"a/x.bin": b"x" * 1000})
    port = free_port()
    node = make_node(f"--http-address=127.0.0.1:{port}")
    context = node.context("s3://shared/a")
    node.stage("pvc-1", context)
    node.publish("pvc-1", of_pod(context, "red", "a-0"))
    node.kill_plugin()
    (record,) = (node.state / "volumes").glob("*.json")
    fields = json.loads(record.read_text())
    for place in fields["places"].values():
        del place["namespace"], place["pod"]
    record.write_text(json.dumps(fields))
    node.start_plugin()
    assert pods(port) == set()
    node.publish("pvc-1", of_pod(context, "red", "a-0"))  # as kubelet does every minute
    assert pods(port) == {("pvc-1", "red", "a-0")}


def of_pod(context: dict[str, str], namespace: str, pod: str) -> dict[str, str]:
    """Attributes as kubelet passes them for a pod."""
    return {
        **context,
        "csi.storage.k8s.io/pod.name": pod,
        "csi.storage.k8s.io/pod.namespace": namespace,
    }
