"""Many pods, and pods of every kind."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import eventually
from driver import Driver
from tenant import WATCH, Tenant, by_claim, claim, inline, pod

CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
NON_ROOT = {
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def test_sixteen_pods_of_two_claims_at_once(tenant: Tenant, driver: Driver) -> None:
    names = [f"reader-{number}" for number in range(16)]
    tenant.apply(
        claim("small", source="s3://models/small/"),
        claim("tiny", source="s3://models/tiny/"),
        *(pod(name, by_claim(("small", "tiny")[n % 2])) for n, name in enumerate(names)),
    )
    tenant.succeeds(*names, within_s=180)


def test_pods_of_one_source_share_a_worker(tenant: Tenant, driver: Driver) -> None:
    tenant.apply(*(pod(name, inline(), *WATCH) for name in ("one", "two")))
    tenant.reads_on("one", "two")
    assert len(driver.workers()) == 1
    tenant.delete("pod", "one")
    tenant.reads_on("two")


def test_one_of_two_pods_of_a_claim_is_recreated(tenant: Tenant) -> None:
    tenant.apply(
        claim("small", source="s3://models/small/"),
        *(pod(name, by_claim("small"), *WATCH) for name in ("stays", "goes")),
    )
    tenant.reads_on("stays", "goes")
    tenant.delete("pod", "goes")
    tenant.reads_on("stays")
    tenant.apply(pod("goes", by_claim("small"), *WATCH))
    tenant.reads_on("stays", "goes")


KINDS: dict[str, dict[str, Any]] = {
    "root": {},
    "non_root": {"securityContext": NON_ROOT, "container": {"securityContext": CONFINED}},
    "fs_group": {"securityContext": {**NON_ROOT, "fsGroup": 2000}},
    "fs_group_always": {"securityContext": {"fsGroup": 3000, "fsGroupChangePolicy": "Always"}},
    "host_network": {"hostNetwork": True},
    "host_to_container": {"mount": {"mountPropagation": "HostToContainer"}},
    "recursive_read_only": {"mount": {"recursiveReadOnly": "IfPossible"}},
    "read_write_mount": {"mount": {"readOnly": False}},
    "sub_path": {"source": "s3://models/", "mount": {"subPath": "small"}},
    "user_namespace": {"hostUsers": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_pod(tenant: Tenant, kind: str) -> None:
    """Reads the model by an inline volume and by a claim at the same time."""
    fields = dict(KINDS[kind])
    source = fields.pop("source", "s3://models/small/")
    tenant.apply(
        claim("claim", source=source),
        pod("by-claim", by_claim("claim"), **fields),
        pod("inline", inline(source), **fields),
    )
    tenant.succeeds("by-claim", "inline", within_s=90)


def test_sub_path_of_a_file(tenant: Tenant) -> None:
    mount = {"subPath": "config.json", "mountPath": "/model/config.json"}
    tenant.apply(pod("reader", inline(), "cat", "/model/config.json", mount=mount))
    tenant.succeeds("reader")
    assert tenant.logs("reader").strip() == '{"model_type": "llama"}'


def test_no_pod_can_write(tenant: Tenant) -> None:
    """Nor run a file of the volume: there are no bits for it, whoever asks."""
    script = "touch /model/new; /model/config.json; find /model -perm /7333 -type f; echo end"
    tenant.apply(pod("writer", inline(), "sh", "-c", script, mount={"readOnly": False}))
    tenant.succeeds("writer")
    lines = tenant.logs("writer").splitlines()
    # Errors and output come by two ways, in any order.
    assert sorted(line.rpartition(": ")[2] for line in lines) == [
        "Permission denied",
        "Read-only file system",
        "end",
    ]


def test_several_models_in_one_pod(tenant: Tenant, driver: Driver) -> None:
    made = pod("reader", inline(), "sh", "-c", "vllm load /model && vllm load /draft")
    made["spec"]["containers"][0]["volumeMounts"].append({"name": "draft", "mountPath": "/draft"})
    made["spec"]["volumes"].append({"name": "draft", **inline("s3://models/tiny/")})
    tenant.apply(made)
    tenant.succeeds("reader")


@pytest.mark.parametrize("limit", ["64Mi"])
def test_pod_with_less_memory_than_the_model(tenant: Tenant, limit: str) -> None:
    """The pages of 192 MiB that it maps are let go of; it is not killed."""
    container = {"resources": {"limits": {"memory": limit}}}
    tenant.apply(pod("reader", inline("s3://models/big/"), container=container))
    tenant.succeeds("reader", within_s=120)


def test_plugin_with_less_memory_than_the_model(tenant: Tenant, driver: Driver) -> None:
    """The load ends, and neither the plugin nor its worker is killed."""
    driver.upgrade("--set", "node.resources.limits.memory=400Mi",
                   "--set", "node.resources.requests.memory=100Mi")  # fmt: skip
    try:
        name = driver.name("node")
        volume = inline("s3://models/huge/", memoryLimit="64MiB")
        tenant.cluster.s3.put_model("models", "huge/", shards=6, shard_mib=100)
        tenant.apply(pod("reader", volume))
        tenant.succeeds("reader", within_s=240)
        after = driver.pod("node")
        assert after is not None and after["metadata"]["name"] == name
        assert after["status"]["containerStatuses"][0]["restartCount"] == 0
    finally:
        tenant.delete("pod", "--all")
        driver.upgrade()
    eventually(lambda: driver.pod("node") is not None, 60, "the plugin is not ready")
