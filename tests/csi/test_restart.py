"""The node plugin is killed and restarted while pods read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounting import shell, wait_until_gone
from nodes import SECRETS, TestNode, hashes, refused, sha256, wait_for
from s3 import S3

pytestmark = pytest.mark.fuse

MIB = 1 << 20
FILES = {
    f"model-0000{number}-of-00002.safetensors": random.Random(number).randbytes(24 * MIB)
    for number in (1, 2)
}
# Reads every file over and over, mapped, and forgets the pages each time.
READER = """
import hashlib, mmap, os, sys, time
until = time.monotonic() + float(sys.argv[1])
rounds = 0
while time.monotonic() < until or rounds < 2:  # on a busy machine one takes long
    rounds += 1
    for path in sys.argv[2:]:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            print(os.path.basename(path), hashlib.sha256(view).hexdigest(), flush=True)
            view.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        time.sleep(0.1)  # other tests want the processors, too
"""


@pytest.fixture(scope="module", autouse=True)
def bucket(server: S3) -> None:
    server.put("restarts", {f"m/{name}": content for name, content in FILES.items()})


@pytest.fixture
def context(node: TestNode) -> dict[str, str]:
    return node.context("s3://restarts/m", blockSize="1MiB")


@contextmanager
def reader(target: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A pod that reads for so long; it must see nothing but right bytes."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(seconds), *(target / name for name in FILES)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
        process.wait(20)
    assert process.returncode == 0
    seen = [line.split() for line in output.splitlines()]
    assert len(seen) > 2
    wanted = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert all(wanted[name] == digest for name, digest in seen)


def test_pods_keep_reading_while_the_plugin_restarts(
    node: TestNode, context: dict[str, str]
) -> None:
    """Three times in a row, by SIGKILL and as an upgrade does."""
    node.stage("vol", context)
    target = node.publish("vol", context)
    mounted = node.mounts()
    with reader(target, 6):
        for kill in (node.kill_plugin, node.plugin.end, node.kill_plugin):
            time.sleep(1)
            if kill == node.kill_plugin:
                kill()
            else:
                node.plugin.end()
            node.start_plugin()
            wait_for(lambda: node.condition("vol", target) is None)
    assert node.mounts() == mounted
    node.stage("vol", context)
    assert node.publish("vol", context, "b").is_dir()
    wait_for(lambda: len(node.workers()) == 1)
    for pod in ("a", "b"):
        node.unpublish("vol", pod)
    node.unstage("vol")
    assert node.leftovers() == []


def test_pods_keep_reading_when_daemons_are_killed(node: TestNode, context: dict[str, str]) -> None:
    node.stage("vol", context)
    target = node.publish("vol", context)
    with reader(target, 6):
        for _ in range(3):
            time.sleep(1)
            (worker,) = node.workers()
            os.kill(worker, signal.SIGKILL)
            wait_until_gone(worker)
            wait_for(lambda: node.condition("vol", target) is None)


def test_everything_continues_after_a_restart(node: TestNode, context: dict[str, str]) -> None:
    """What was staged is known; all of it can be taken away, also while it is being resumed."""
    for volume in ("one", "two"):
        node.stage(volume, {**context, "blockSize": "2MiB" if volume == "two" else "1MiB"})
        node.publish(volume, {**context, "blockSize": "2MiB" if volume == "two" else "1MiB"})
    node.kill_plugin()
    node.start_plugin()
    node.unpublish("two")
    node.unstage("two")
    assert hashes(node.target("one")) == sha256(FILES), "with the credentials of before"
    node.unpublish("one")
    node.unstage("one")
    assert node.leftovers() == []


def test_an_upgrade_may_change_defaults(node: TestNode, context: dict[str, str]) -> None:
    """What kubelet repeats is for the same volume, and what runs goes on as it began."""
    node.stage("vol", context)
    target = node.publish("vol", context)
    node.plugin.end()
    node.start_plugin("--memory-limit=64MiB")
    node.stage("vol", context)
    assert node.publish("vol", context) == target
    wait_for(lambda: len(node.workers()) == 1)
    assert hashes(target) == sha256(FILES)


def test_unstage_of_a_volume_without_a_daemon(node: TestNode, context: dict[str, str]) -> None:
    node.stage("vol", context)
    node.publish("vol", context)
    node.kill_plugin()
    node.kill_keeper()
    node.start_plugin()
    node.unpublish("vol")
    node.unstage("vol")
    assert node.leftovers() == []


def test_without_the_keeper_credentials_are_requested(
    node: TestNode, context: dict[str, str]
) -> None:
    """Keeper and plugin died: keys are nowhere. Staging again brings them, and all is repaired."""
    node.stage("vol", context)
    target = node.publish("vol", context)
    node.kill_plugin()
    node.kill_keeper()
    assert "not connected" in shell(f"ls {target}", node.directory).stderr
    node.start_plugin()
    wait_for(lambda: "credentials are lost" in (node.condition("vol", target) or ""))
    code, message = refused(lambda: node.publish("vol", context, "b"))
    assert (code, "credentials are lost" in message) == ("FAILED_PRECONDITION", True)

    node.stage("vol", context)
    wait_for(lambda: "mounted again" in (node.condition("vol", target) or ""))
    assert hashes(target) == sha256(FILES), "what starts in the pod from now on can read"
    assert hashes(node.publish("vol", context, "b")) == sha256(FILES)
    assert node.condition("vol", node.target("vol", "b")) is None
    for pod in ("a", "b"):
        node.unpublish("vol", pod)
    node.unstage("vol")
    assert node.leftovers() == []


def test_without_the_keeper_volumes_without_secrets_are_mounted_again(
    make_node: Callable[..., TestNode],
) -> None:
    node = make_node(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
    context = node.context("s3://restarts/m")
    node.stage("vol", context, secrets={})
    target = node.publish("vol", context)
    node.kill_plugin()
    node.kill_keeper()
    node.start_plugin()
    wait_for(lambda: "mounted again" in (node.condition("vol", target) or ""))
    assert hashes(target) == sha256(FILES)
    node.unpublish("vol")
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_replaced_keeper_gets_the_sessions(node: TestNode, context: dict[str, str]) -> None:
    """Only the keeper died: nobody notices, and the next death of a worker is survived as well."""
    node.stage("vol", context)
    target = node.publish("vol", context)
    with reader(target, 6):
        node.keeper.end()
        (worker,) = node.workers()
        os.kill(worker, signal.SIGKILL)
        wait_until_gone(worker)
        wait_for(lambda: "its daemon is down" in (node.condition("vol", target) or ""))
        wait_for(lambda: "no keeper" in (node.condition("vol", target) or ""))
        node.start_keeper()
        wait_for(lambda: node.condition("vol", target) is None)
        node.kill_keeper()
        wait_for(lambda: node.kept() != [])
        node.kill_plugin()
        node.start_plugin()
        wait_for(lambda: node.condition("vol", target) is None)


def test_a_reboot_leaves_nothing(node: TestNode, context: dict[str, str]) -> None:
    """Records of another boot are of mounts that are gone."""
    node.stage("vol", context)
    node.publish("vol", context)
    node.kill_plugin()
    node.kill_keeper()
    for path in reversed(node.mounts()):
        subprocess.run(["umount", "-l", path], check=True)
    for path in node.state.glob("*/*.json"):
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "boot_id": "another"}))
    node.start_plugin()
    assert [*node.state.glob("*/*.json"), *node.state.glob("mounts/*")] == []
    node.unpublish("vol")
    node.stage("vol", context)
    assert hashes(node.publish("vol", context)) == sha256(FILES)


def test_a_damaged_record_is_cleaned_up(node: TestNode, context: dict[str, str]) -> None:
    node.stage("vol", context)
    node.publish("vol", context)
    node.kill_plugin()
    (record,) = node.state.glob("volumes/*.json")
    record.write_text("{")
    node.start_plugin()
    assert node.workers() == []
    assert refused(lambda: node.publish("vol", context))[0] == "FAILED_PRECONDITION"
    node.unpublish("vol")
    node.stage("vol", context)
    node.unstage("vol")
    assert node.leftovers() == []


def test_killed_in_the_middle(node: TestNode, context: Mapping[str, str]) -> None:
    """Killed at random moments of a life cycle, then repeated by kubelet: nothing is left."""
    randomness = random.Random(7)
    for _ in range(4):
        killer = subprocess.Popen(
            [
                "bash",
                "-c",
                f"sleep {randomness.uniform(0.05, 1.2)}; kill -9 {node.plugin.process.pid}",
            ]
        )
        steps = (
            lambda: node.stage("vol", context, secrets=SECRETS),
            lambda: node.publish("vol", context),
            lambda: node.unpublish("vol"),
            lambda: node.unstage("vol"),
        )
        for step in steps:
            node.until_done(step)
        killer.wait(20)
        if node.plugin.process.poll() is not None:
            node.start_plugin()
        node.until_done(lambda: node.unstage("vol"))
        assert node.leftovers() == []
