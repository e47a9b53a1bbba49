"""S3 is silent or refuses connections: pods wait, and can be deleted, whatever they wait for."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator

import pytest
from cluster import eventually
from driver import Driver
from objectstore import ObjectStore
from tenant import Tenant, by_claim, claim, inline, pod, storage_class

# With a grace period of 2 s.
GONE_WITHIN_S = 10
COUNT = itertools.count(1)


class Link:
    """The way to S3.

    Args:
        silent: when it is cut, S3 does not answer; else it refuses connections.
    """

    def __init__(self, s3: ObjectStore, silent: bool) -> None:
        self._s3, self._silent, self._is_cut = s3, silent, False

    def cut(self) -> None:
        self._s3.signal(signal.SIGSTOP if self._silent else signal.SIGKILL)
        self._is_cut = True

    def mend(self) -> None:
        if self._is_cut:
            self._is_cut = False
            if self._silent:
                self._s3.signal(signal.SIGCONT)
            else:
                self._s3.start_again()


@pytest.fixture(params=[True, False], ids=["silent", "refusing"])
def link(request: pytest.FixtureRequest, tenant: Tenant) -> Iterator[Link]:
    made = Link(tenant.cluster.s3, request.param)
    yield made
    made.mend()


@pytest.fixture
def uncached(tenant: Tenant) -> str:
    """A model that no scenario has read: the node's cache would serve it without S3."""
    prefix = f"uncached-{next(COUNT)}/"
    tenant.cluster.s3.put_model("models", prefix, shards=4, shard_mib=48)
    return f"s3://models/{prefix}"


def delete_in_time(tenant: Tenant, name: str) -> None:
    started = time.monotonic()
    tenant.delete("pod", name, within_s=60)
    took = time.monotonic() - started
    assert took < GONE_WITHIN_S, f"{name} was gone after {took:.0f} s"


# Nothing comes before it is asked for, so that it is asked for when S3 is away.
LAZY = {"prefetch": "off"}


def test_pod_that_reads_is_deleted(tenant: Tenant, link: Link, uncached: str) -> None:
    volume = inline(uncached, bandwidthLimit="4MB")
    tenant.apply(
        pod("reader", volume, "sh", "-c", "echo reading; cat /model/*.safetensors > /dev/null")
    )
    eventually(lambda: "reading" in tenant.logs("reader"), 60, lambda: tenant.describe("reader"))
    link.cut()
    delete_in_time(tenant, "reader")


@pytest.mark.parametrize("kind", ["by_claim", "inline"])
def test_pod_that_faults_a_page_is_deleted(
    tenant: Tenant, driver: Driver, link: Link, kind: str
) -> None:
    """It mapped all shards while S3 was there, and touches them when S3 is away."""
    tenant.apply(
        storage_class_of_big(),
        claim("big", "lazy"),
        pod("reader", by_claim("big") if kind == "by_claim" else inline("s3://models/big/", **LAZY),
            "vllm", "hold", "/model"),
    )  # fmt: skip
    eventually(lambda: "mapped" in tenant.logs("reader"), 90, lambda: tenant.describe("reader"))
    link.cut()
    (held,) = driver.pids("vllm hold /model")
    driver.cluster.on_node("kill", "-USR1", held)
    eventually(lambda: waits_in_fuse(driver, held), 30, "it does not wait for its page")
    delete_in_time(tenant, "reader")


def test_pod_that_opens_a_shard_when_s3_was_away_for_long_is_deleted(
    tenant: Tenant, driver: Driver, link: Link
) -> None:
    """A second pod of a volume, which faults its first page then."""
    tenant.apply(
        storage_class_of_big(),
        claim("big", "lazy"),
        pod("first", by_claim("big"), "sleep", "infinity"),
    )
    eventually(lambda: tenant.phase("first") == "Running", 90, lambda: tenant.describe("first"))
    link.cut()
    tenant.apply(pod("second", by_claim("big"), "python3", "-c", TOUCH))
    found = eventually(
        lambda: driver.pids("^python3 -c import mmap"), 60, lambda: tenant.describe("second")
    )
    eventually(lambda: waits_in_fuse(driver, found[0]), 30, "it does not wait for its page")
    delete_in_time(tenant, "second")
    delete_in_time(tenant, "first")


TOUCH = """import mmap
shard = open("/model/model-00003-of-00004.safetensors")
print(mmap.mmap(shard.fileno(), 0, prot=mmap.PROT_READ)[9 << 20])
"""


def waits_in_fuse(driver: Driver, pid: str) -> bool:
    """Whether the kernel has asked the daemon for it."""
    where = driver.cluster.on_node("sh", "-c", f"cat /proc/{pid}/task/*/wchan 2>/dev/null || true")
    return "request_wait_answer" in where or "folio_wait" in where


def storage_class_of_big() -> dict[str, object]:
    return storage_class("lazy", source="s3://models/big/", **LAZY)


def test_pod_that_is_not_mounted_yet_is_deleted(tenant: Tenant, link: Link) -> None:
    link.cut()
    tenant.apply(pod("reader", inline("s3://models/tiny/", ioTimeout="20m")))
    tenant.warned("reader", ["minio.storage"], within_s=60)
    delete_in_time(tenant, "reader")


def test_pod_that_waits_for_its_model_is_deleted(
    tenant: Tenant, driver: Driver, link: Link, uncached: str
) -> None:
    """With `waitFor: model`, when S3 goes away on the way."""
    volume = inline(uncached, bandwidthLimit="8MB", waitFor="model")
    tenant.apply(pod("reader", volume))
    eventually(driver.workers, 60, "no worker")
    link.cut()
    delete_in_time(tenant, "reader")


def test_node_is_drained(tenant: Tenant, driver: Driver, link: Link) -> None:
    tenant.apply(
        claim("big", source="s3://models/big/"),
        pod("by-claim", by_claim("big"), "sleep", "infinity"),
        pod("inline", inline(), "sleep", "infinity"),
    )
    for name in ("by-claim", "inline"):
        eventually(lambda name=name: tenant.phase(name) == "Running", 90,
                   lambda name=name: tenant.describe(name))  # fmt: skip
    link.cut()
    try:
        tenant.cluster.kubectl(
            "drain", "node1", "--ignore-daemonsets", "--force", "--delete-emptydir-data",
            "--pod-selector=!app.kubernetes.io/component", "--timeout=30s", timeout_s=90,
        )  # fmt: skip
        eventually(lambda: not driver.left(), 60, driver.left)
    finally:
        tenant.cluster.kubectl("uncordon", "node1")


def test_pod_reads_on_when_s3_is_back(tenant: Tenant, link: Link, uncached: str) -> None:
    """It waited, and saw no error."""
    tenant.apply(pod("reader", inline(uncached, bandwidthLimit="30MB")))
    eventually(lambda: tenant.phase("reader") == "Running", 60, lambda: tenant.describe("reader"))
    link.cut()
    with pytest.raises(AssertionError):
        tenant.succeeds("reader", within_s=15)
    link.mend()
    tenant.succeeds("reader", within_s=90)
