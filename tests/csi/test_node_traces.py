"""Traces of a node plugin and of the mounts that it starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from collector import Collector, attributes
from nodes import TestNode, refused
from s3 import S3

pytestmark = pytest.mark.fuse


def test_a_mount_belongs_to_the_call_that_made_it(
    make_node: Callable[..., TestNode], s3: S3
) -> None:
    s3.put("traced", {"a/x.bin": b"x" * 1000})
    collector = Collector()
    try:
        node = make_node(**collector.environment)
        context = node.context("s3://traced/a")
        node.stage("pvc-1", context)
        target = node.publish("pvc-1", context)
        refused(lambda: node.stage("pvc-2", node.context("s3://no-such-bucket")))
        (staged, failed) = collector.wait_for("NodeStageVolume", lambda spans: len(spans) == 2)
        (mount,) = [
            span for span in collector.wait_for("mount")
            if attributes(span)["lazyfs.source"] == "s3://traced/a"
        ]  # fmt: skip
        assert (mount.trace_id, mount.parent_span_id) == (staged.trace_id, staged.span_id)
        told = attributes(staged)
        assert (told["lazyfs.volume"], told["rpc.grpc.status_code"]) == ("pvc-1", 0)
        assert attributes(failed)["rpc.grpc.status_code"] == 5 and failed.status.code == 2
        assert collector.wait_for("NodePublishVolume")
        node.stats("pvc-1", target)
        assert collector.services[staged.span_id] == "lazyfs-csi"
        assert collector.services[mount.span_id] == "lazyfs"
        node.plugin.end()
        assert not collector.named("NodeGetVolumeStats"), "asked over and over"
    finally:
        collector.stop()
