"""Models that change while pods use them: each new pod sees what S3 lists when it starts."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import pytest
from cluster import eventually
from driver import Driver
from objectstore import ObjectStore
from tenant import NAMESPACE, WATCH, Tenant, by_claim, claim, inline, pod, storage_class

COUNT = itertools.count(1)


@pytest.fixture
def prefix(tenant: Tenant) -> str:
    """A model of which one shard has been uploaded."""
    made = f"growing-{next(COUNT)}/"
    tenant.cluster.s3.put_model("models", made, shards=1)
    return made


@pytest.fixture
def s3(tenant: Tenant) -> Iterator[ObjectStore]:
    store = tenant.cluster.s3
    yield store
    store.signal(signal.SIGCONT)


def sees(tenant: Tenant, name: str, many: int) -> None:
    """Wait until a pod has listed so many files, config.json and digests among them."""
    eventually(
        lambda: len(tenant.logs(name).split()) == many,
        60,
        lambda: f"{many} files: {tenant.describe(name)}",
    )


LIST = ("sh", "-c", "ls /model && exec sleep 600")


def test_a_rolling_restart_after_an_upload(tenant: Tenant, driver: Driver, prefix: str) -> None:
    """By a staged volume, whose claim the old pod and the new one use at the same time."""
    tenant.apply(claim("model", source=f"s3://models/{prefix}"))
    labels = {"app": "server"}
    template = pod("server", by_claim("model"), *LIST)
    template["spec"]["restartPolicy"] = "Always"
    tenant.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "server", "namespace": NAMESPACE},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
                "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
            },
        }
    )
    cluster = tenant.cluster
    rolled_out = ("-n", NAMESPACE, "rollout", "status", "deployment/server", "--timeout=90s")
    cluster.kubectl(*rolled_out, timeout_s=100)
    before = {each["metadata"]["name"] for each in cluster.list("pods", NAMESPACE, "app=server")}
    for name in before:
        sees(tenant, name, 3)
    assert len(driver.workers()) == 1

    cluster.s3.put_model("models", prefix, shards=3)
    cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/server")
    cluster.kubectl(*rolled_out, timeout_s=100)
    eventually(
        lambda: not before & {e["metadata"]["name"] for e in cluster.list("pods", NAMESPACE)},
        60,
        "the old pods do not end",
    )
    for each in cluster.list("pods", NAMESPACE, "app=server"):
        sees(tenant, each["metadata"]["name"], 6)
    eventually(lambda: len(driver.workers()) == 1, 60, "the old snapshot outlives its pods")


def test_a_pod_that_runs_keeps_its_snapshot(tenant: Tenant, driver: Driver, prefix: str) -> None:
    source = f"s3://models/{prefix}"
    tenant.apply(pod("old", inline(source), *WATCH))
    tenant.reads_on("old")
    tenant.cluster.s3.client.put_object(Bucket="models", Key=f"{prefix}adapter.bin", Body=b"new")
    tenant.apply(pod("new", inline(source), "cat", "/model/adapter.bin"))
    tenant.succeeds("new")
    assert tenant.logs("new") == "new"
    tenant.reads_on("old")
    driver.delete("node")
    tenant.reads_on("old")
    assert len(driver.workers()) == 1


def test_a_new_pod_while_s3_is_silent(
    tenant: Tenant, driver: Driver, prefix: str, s3: ObjectStore
) -> None:
    """It starts with the snapshot that is there, out of the node's cache."""
    tenant.apply(
        storage_class("growing", source=f"s3://models/{prefix}"),
        claim("model", "growing"),
        pod("old", by_claim("model"), *WATCH),
    )
    tenant.reads_on("old")
    s3.signal(signal.SIGSTOP)
    tenant.apply(pod("new", by_claim("model")))
    tenant.succeeds("new", within_s=90)
    s3.signal(signal.SIGCONT)
    assert len(driver.workers()) == 1
