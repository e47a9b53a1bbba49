"""Log lines of a node plugin and its mounts name their volumes and calls."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from nodes import SECRETS, TestNode, refused, wait_for
from s3 import S3

pytestmark = pytest.mark.fuse


def lines(node: TestNode) -> list[dict[str, Any]]:
    """The log, line by line."""
    return [json.loads(line) for line in node.plugin.log().splitlines()]


def volumes_of(node: TestNode, beginning: str) -> list[str | None]:
    """Which volumes the lines name that begin so."""
    return [line.get("volume") for line in lines(node) if line["message"].startswith(beginning)]


def test_lines_name_volumes_and_requests(make_node: Callable[..., TestNode], s3: S3) -> None:
    s3.put("logged", {"a/x.bin": b"x" * 1000})
    node = make_node("--log-format=json")
    context = node.context("s3://logged/a")
    node.stage("pvc-1", context)
    node.publish("pvc-1", context)
    node.plugin.wait_for_log("NodeStageVolume: OK")
    (mounted,) = [line for line in lines(node) if line["message"].startswith("mounted ")]
    assert mounted["volume"] == "pvc-1"
    assert mounted["mountpoint"].startswith(str(node.state / "mounts"))
    staged = [line for line in lines(node) if line["message"].startswith("NodeStageVolume: OK")]
    assert [line["volume"] for line in staged] == ["pvc-1"]
    # All lines of a request have its id, and no other line has.
    of_it = [line for line in lines(node) if line.get("rpc") == staged[0]["rpc"]]
    assert [line["message"].split()[0] for line in of_it] == ["volume", "NodeStageVolume:"]
    # Another volume of the same source joins, the worker dies, and the first one leaves.
    node.stage("pvc-2", context)
    wait_for(lambda: lines_of_the_worker_name(node, "pvc-1,pvc-2"))
    wait_for(lambda: volumes_of(node, "resumed ")[-1:] == ["pvc-1,pvc-2"])
    assert volumes_of(node, f"{mounted['mountpoint']}: worker")[-1] == "pvc-1,pvc-2"
    node.unpublish("pvc-1")
    node.unstage("pvc-1")
    wait_for(lambda: lines_of_the_worker_name(node, "pvc-2"))
    # The next plugin knows as well.
    node.plugin.end()
    node.start_plugin("--log-format=json")
    wait_for(lambda: volumes_of(node, "resumed ")[-1] == "pvc-2")
    assert not any(secret in node.plugin.log() for secret in SECRETS.values())


def lines_of_the_worker_name(node: TestNode, volumes: str) -> bool:
    """Have the worker say something, and see whether it names these volumes."""
    (worker,) = node.workers()
    before = len(volumes_of(node, "resumed "))
    os.kill(worker, signal.SIGTERM)  # another one goes on
    wait_for(lambda: len(volumes_of(node, "resumed ")) > before)
    said = volumes_of(node, "ending on SIGTERM")  # nothing, if it came before it listened
    return bool(said) and said[-1] == volumes


def test_requests_of_s3_that_failed_are_named(make_node: Callable[..., TestNode], s3: S3) -> None:
    s3.put("logged", {"a/x.bin": b"x" * 1000})
    node = make_node("--log-format=json")
    headers = {"x-amz-request-id": "4442587FB7D0A2F9"}
    s3.fault("GET /logged.*list-type", "status", status=403, code="AccessDenied", headers=headers)
    code, message = refused(lambda: node.stage("pvc-1", node.context("s3://logged/a")))
    assert code == "PERMISSION_DENIED"
    assert "request" not in message, "events that are equal are counted"
    node.plugin.wait_for_log('"NodeStageVolume: ')
    (line,) = [line for line in lines(node) if line["message"].startswith("NodeStageVolume: ")]
    assert line["level"] == "warning" and "(request 4442587FB7D0A2F9)" in line["message"]
