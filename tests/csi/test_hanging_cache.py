"""Volumes whose cache is on a disk that does not answer come and go like others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from hanging_disk import HangingDisk
from nodes import TestNode, hashes, sha256, wait_for
from s3 import S3

pytestmark = pytest.mark.fuse

FILES = {f"part-{i}.bin": random.Random(i).randbytes((4 << 20) + i) for i in range(4)}
# Kubelet waits for two minutes.
LONGEST_S = 60


@pytest.fixture
def volume(
    disk: HangingDisk, make_node: Callable[..., TestNode], s3: S3
) -> Iterator[tuple[TestNode, dict[str, str]]]:
    """A node whose cache is on the disk, and the attributes of a volume."""
    s3.put("hanging-volume", {f"m/{name}": body for name, body in FILES.items()})
    node = make_node(f"--cache-dir={disk.path}/cache")
    yield node, node.context("s3://hanging-volume/m", blockSize="1MiB", prefetch="off")
    disk.answer()


def in_cache(node: TestNode, context: dict[str, str]) -> None:
    """Put the files on the disk, and end that volume."""
    node.stage("pvc-1", context)
    assert hashes(node.publish("pvc-1", context)) == sha256(FILES)
    node.unpublish("pvc-1")
    node.unstage("pvc-1")


def test_volumes_leave_while_the_disk_hangs(
    volume: tuple[TestNode, dict[str, str]], disk: HangingDisk
) -> None:
    node, context = volume
    in_cache(node, context)
    node.stage("pvc-1", context)
    node.publish("pvc-1", context)
    disk.hang()
    assert hashes(node.target("pvc-1")) == sha256(FILES), "from S3"
    began_s = time.monotonic()
    node.unpublish("pvc-1")
    node.unstage("pvc-1")
    assert time.monotonic() < began_s + LONGEST_S
    assert not node.mounts()


def test_volumes_come_while_the_disk_hangs(
    volume: tuple[TestNode, dict[str, str]], disk: HangingDisk
) -> None:
    node, context = volume
    in_cache(node, context)
    wait_for(lambda: not node.workers())
    disk.hang()
    began_s = time.monotonic()
    node.stage("pvc-2", context)
    target = node.publish("pvc-2", context)
    assert time.monotonic() < began_s + LONGEST_S
    assert hashes(target) == sha256(FILES)
    node.unpublish("pvc-2")
    node.unstage("pvc-2")
    assert not node.mounts()
