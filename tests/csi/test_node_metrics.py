"""What Prometheus scrapes from a node plugin."""

from __future__ import annotations

import os
import signal
import socket
import urllib.request
from collections.abc import Callable

import pytest
from nodes import TestNode
from s3 import S3

pytestmark = pytest.mark.fuse


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def scrape(port: int) -> dict[str, float]:
    """All samples, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
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
