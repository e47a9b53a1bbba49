"""A new pod sees what S3 lists now, while older pods of the node keep what they have."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mounting import shell, workers
from nodes import SECRETS, TestNode, hashes, refused, sha256, wait_for
from s3 import S3

from csi.snapshots import MOST_SNAPSHOTS

pytestmark = pytest.mark.fuse

MIB = 1 << 20
OLD = {"config.json": b"{}", "model-1.safetensors": random.Random(1).randbytes(3 * MIB)}
ADDED = {"model-2.safetensors": random.Random(2).randbytes(2 * MIB)}
INLINE = {"csi.storage.k8s.io/ephemeral": "true"}


_prefixes = itertools.count()


class Model:
    """What is below one prefix of the bucket `uploads`, for one test."""

    def __init__(self, s3: S3) -> None:
        self.s3 = s3
        self.prefix = f"m{next(_prefixes)}"
        self.source = f"s3://uploads/{self.prefix}"
        # The listings that a mount and a look ask for.
        self.listings = rf"GET /uploads\?.*prefix={self.prefix}%2F"
        self.put(OLD)

    def put(self, files: dict[str, bytes]) -> None:
        self.s3.put("uploads", {f"{self.prefix}/{name}": body for name, body in files.items()})

    def delete(self, name: str) -> None:
        self.s3.client.delete_object(Bucket="uploads", Key=f"{self.prefix}/{name}")


@pytest.fixture
def model(s3: S3) -> Model:
    return Model(s3)


def inline(node: TestNode, model: Model, name: str, **attributes: str) -> Path:
    """A pod with an inline volume."""
    context = {**node.context(model.source, **attributes), **INLINE}
    return node.publish(f"csi-{name}", context, name, staging_target_path="", secrets=SECRETS)


def gone(node: TestNode, *names: str) -> None:
    for name in names:
        node.unpublish(f"csi-{name}", name)


def message(node: TestNode, name: str, target: Path) -> tuple[bool, str]:
    return message_of(node, f"csi-{name}", target)


def message_of(node: TestNode, volume: str, target: Path) -> tuple[bool, str]:
    condition = node.stats(volume, target).volume_condition
    return condition.abnormal, condition.message


def names(target: Path) -> set[str]:
    return set(shell("ls", target).stdout.split())


def test_a_new_pod_sees_what_was_uploaded(node: TestNode, model: Model) -> None:
    first = inline(node, model, "one")
    assert hashes(first) == sha256(OLD)
    model.put(ADDED)
    model.s3.forget()
    second, third = inline(node, model, "two"), inline(node, model, "three")
    for target in (second, third):
        assert hashes(target) == sha256({**OLD, **ADDED})
    fetched = {path for path, _ in model.s3.data_requests()}
    assert fetched == {f"/uploads/{model.prefix}/model-2.safetensors"}, (
        "the rest is in the node's cache"
    )
    assert hashes(first) == sha256(OLD), "what runs keeps its snapshot"
    assert len(node.workers()) == 2, "later pods share the new one"

    abnormal, text = message(node, "one", first)
    assert not abnormal and "it listed other objects: new pods see those" in text
    abnormal, text = message(node, "two", second)
    assert not abnormal and text.startswith("the volume is served as S3 listed it at 20")
    assert "other objects" not in text

    gone(node, "one")
    wait_for(lambda: len(node.workers()) == 1)
    assert hashes(second) == sha256({**OLD, **ADDED})
    gone(node, "two", "three")
    assert node.leftovers() == []


def test_a_rolling_restart_of_a_staged_volume(node: TestNode, model: Model) -> None:
    """Its daemon has the node-stage secret, and the volume stays staged all the time."""
    context = node.context(model.source, waitFor="model")
    node.stage("vol", context)
    assert hashes(node.publish("vol", context, "a")) == sha256(OLD)
    model.put({"model-1.safetensors": b"replaced", "config.json": b'{"new": true}'})
    new = {"model-1.safetensors": b"replaced", "config.json": b'{"new": true}'}
    second = node.publish("vol", context, "b")
    assert hashes(second) == sha256(new)
    node.unpublish("vol", "a")
    wait_for(lambda: len(node.workers()) == 1)  # the old one ends with its last pod
    assert hashes(node.publish("vol", context, "c")) == sha256(new)
    assert len(node.workers()) == 1
    assert node.condition("vol", node.staging("vol")) is None
    for pod in ("b", "c"):
        node.unpublish("vol", pod)
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_rollback_goes_back_to_the_mount_that_is_there(node: TestNode, model: Model) -> None:
    inline(node, model, "one")
    model.put({"config.json": b"[]"})
    inline(node, model, "two")
    model.put(OLD)
    third = inline(node, model, "three")
    assert hashes(third) == sha256(OLD)
    assert len(node.workers()) == 2


def test_pods_that_start_together_after_an_upload_share_one(node: TestNode, model: Model) -> None:
    inline(node, model, "one")
    model.put(ADDED)
    with ThreadPoolExecutor(6) as threads:
        targets = list(threads.map(lambda n: inline(node, model, f"new{n}"), range(6)))
    assert {frozenset(names(target)) for target in targets} == {frozenset({*OLD, *ADDED})}
    assert len(node.workers()) == 2


def test_directories_of_a_large_source(node: TestNode, model: Model) -> None:
    """What nobody has seen does not count; what somebody has seen does."""
    model.s3.put_many(
        "uploads", [f"{model.prefix}/{n:03}/{k}" for n in range(60) for k in range(30)]
    )
    first = inline(node, model, "one")
    assert len(names(first / "000")) == len(names(first / "059")) == 30
    model.put({"040/new": b"never seen before"})
    second = inline(node, model, "two")
    assert len(node.workers()) == 1
    assert "new" in names(second / "040")
    model.put({"059/new": b"in a directory that was listed"})
    third = inline(node, model, "three")
    assert "new" in names(third / "059")
    assert "new" not in names(first / "059")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "hang", "seconds": 600}, "S3 has not answered within"),
        ({"kind": "status", "status": 503, "code": "SlowDown"}, "SlowDown"),
        ({"kind": "status", "status": 403, "code": "AccessDenied"}, "s3:ListBucket"),
    ],
)
def test_s3_gives_no_answer(node: TestNode, model: Model, fault: dict[str, Any], said: str) -> None:
    """A pod starts all the same, and its condition says what it got."""
    inline(node, model, "one")
    model.put(ADDED)
    model.s3.fault(model.listings, times=1000, **fault)
    second = inline(node, model, "two")
    assert hashes(second) == sha256(OLD)
    abnormal, text = message(node, "two", second)
    assert abnormal and "got the snapshot of 20" in text and said in text, text
    model.s3.forget()

    (worker,) = node.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: message(node, "two", second) == (abnormal, text))

    # After a pause: a failed look is not repeated at once.
    def sees_it() -> bool:
        target = inline(node, model, "three")
        found = names(target) == {*OLD, *ADDED}
        if not found:
            gone(node, "three")
        return found

    wait_for(sees_it, 60)
    abnormal, text = message(node, "two", second)
    assert abnormal and "delete the pod so that the next one sees them" in text
    assert not message(node, "three", node.target("csi-three", "three"))[0]


def test_the_condition_clears_when_s3_lists_the_same(node: TestNode, model: Model) -> None:
    first = inline(node, model, "one")
    model.s3.fault(model.listings, "status", 1000, status=503, code="SlowDown")
    second = inline(node, model, "two")
    assert message(node, "two", second)[0]
    model.s3.forget()

    def settled() -> bool:
        inline(node, model, "three")
        gone(node, "three")
        return not message(node, "two", second)[0]

    wait_for(settled, 60)
    assert not message(node, "one", first)[0]
    assert len(node.workers()) == 1


def test_everything_was_deleted(node: TestNode, model: Model) -> None:
    """As while a model is replaced: what is cached serves on, and the condition warns."""
    first = inline(node, model, "one")
    assert hashes(first) == sha256(OLD)
    for name in OLD:
        model.delete(name)
    second = inline(node, model, "two")
    assert hashes(second) == sha256(OLD)
    abnormal, text = message(node, "two", second)
    assert abnormal and "no objects below this prefix" in text


def test_a_new_snapshot_cannot_be_mounted(node: TestNode, model: Model) -> None:
    """The listing is there, but the first object cannot be asked for as S3 must be."""
    inline(node, model, "one")
    model.put({"a.json": b"first of all"})
    model.s3.fault(
        f"GET /uploads/{model.prefix}/a.json", "status", 1000, status=501, code="NotImplemented"
    )
    second = inline(node, model, "two")
    assert hashes(second) == sha256(OLD)
    abnormal, text = message(node, "two", second)
    assert abnormal and "a new snapshot cannot be mounted" in text
    assert len(node.workers()) == 1, "nothing is left of it"
    model.s3.forget()
    assert "a.json" in names(inline(node, model, "three"))
    gone(node, "one", "two", "three")
    assert node.leftovers() == []


def test_a_node_serves_a_few_snapshots_of_a_source(node: TestNode, model: Model) -> None:
    for number in range(MOST_SNAPSHOTS):
        model.put({f"version-{number}": b""})
        inline(node, model, str(number))
    model.put({"one-too-many": b""})
    last = inline(node, model, "last")
    newest = {f"version-{number}" for number in range(MOST_SNAPSHOTS)}
    assert names(last) == {*OLD, *newest}
    abnormal, text = message(node, "last", last)
    assert abnormal and f"serves {MOST_SNAPSHOTS} snapshots" in text
    assert len(node.workers()) == MOST_SNAPSHOTS
    gone(node, "0")
    assert "one-too-many" in names(inline(node, model, "next"))


def test_the_bound_of_a_namespace_fails_no_pod_that_has_a_snapshot(
    make_node: Callable[..., TestNode], model: Model
) -> None:
    node = make_node("--max-daemons-per-namespace=1")
    inline(node, model, "one")
    model.put(ADDED)
    second = inline(node, model, "two")
    assert names(second) == {*OLD}
    abnormal, text = message(node, "two", second)
    assert abnormal and "--max-daemons-per-namespace" in text


def test_snapshots_of_a_staged_volume_count_for_the_namespace_of_its_pods(
    make_node: Callable[..., TestNode], model: Model
) -> None:
    node = make_node("--max-daemons-per-namespace=2")
    context = node.context(model.source)
    node.stage("vol", context)
    for pod, added in (("a", {}), ("b", ADDED), ("c", {"third": b"too many"})):
        model.put(added)
        node.publish("vol", context, pod)
    assert names(node.target("vol", "c")) == {*OLD, *ADDED}
    assert len(node.workers()) == 2
    abnormal, text = message_of(node, "vol", node.target("vol", "c"))
    assert abnormal and "--max-daemons-per-namespace" in text
    for pod in ("a", "b", "c"):
        node.unpublish("vol", pod)
    node.unstage("vol")
    assert node.leftovers() == []


def test_snapshots_outlive_the_plugin(node: TestNode, model: Model) -> None:
    context = node.context(model.source)
    node.stage("vol", context)
    first = node.publish("vol", context, "a")
    model.put(ADDED)
    second = node.publish("vol", context, "b")
    node.kill_plugin()
    node.start_plugin()
    model.put({"third": b"while it was away"})
    assert "third" in names(node.publish("vol", context, "c"))
    assert hashes(first) == sha256(OLD)
    assert hashes(second) == sha256({**OLD, **ADDED})
    wait_for(lambda: len(node.workers()) == 3)
    for pod in ("a", "b", "c"):
        node.unpublish("vol", pod)
    node.unstage("vol")
    assert node.leftovers() == []


def test_a_stopped_worker_holds_up_no_pod(node: TestNode, model: Model) -> None:
    first = inline(node, model, "one")
    assert hashes(first) == sha256(OLD)
    mine = str(node.state)
    (worker,) = [pid for pid, words in workers() if any(mine in word for word in words)]
    os.kill(worker, signal.SIGSTOP)
    try:
        second = inline(node, model, "two")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert hashes(second) == sha256(OLD)


def test_the_age_of_a_listing_can_be_allowed(
    make_node: Callable[..., TestNode], model: Model
) -> None:
    node = make_node("--snapshot-max-age=1h")
    inline(node, model, "one")
    model.put(ADDED)
    assert names(inline(node, model, "two")) == {*OLD}
    assert len(node.workers()) == 1
    assert names(inline(node, model, "three", snapshotMaxAge="0s")) == {*OLD, *ADDED}
    code, said = refused(lambda: inline(node, model, "four", snapshotMaxAge="soon"))
    assert (code, "snapshotMaxAge: 'soon' is not allowed" in said) == ("INVALID_ARGUMENT", True)
