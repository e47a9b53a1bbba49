"""Volumes of every kind, as users write them."""

from __future__ import annotations

import json

from cluster import Cluster, eventually
from driver import Driver
from tenant import NAMESPACE, Tenant, by_claim, claim, inline, pod, storage_class


def test_claim_that_chooses_its_model_by_annotation(tenant: Tenant) -> None:
    tenant.apply(claim("small", source="s3://models/small/"), pod("reader", by_claim("small")))
    tenant.bound("small", within_s=30)
    tenant.succeeds("reader", within_s=45)


def test_claim_of_a_class_with_a_source(tenant: Tenant) -> None:
    tenant.apply(
        storage_class("small", source="s3://models/small/"),
        claim("of-the-class", "small"),
        pod("reader", by_claim("of-the-class")),
    )
    tenant.succeeds("reader", within_s=60)


def test_claim_whose_name_is_the_models(tenant: Tenant) -> None:
    tenant.apply(
        storage_class("by-name", source="s3://models/${pvc.name}/"),
        claim("tiny", "by-name"),
        pod("reader", by_claim("tiny")),
    )
    tenant.succeeds("reader", within_s=60)


def test_static_volume(tenant: Tenant) -> None:
    """Written by hand, with its Secret."""
    tenant.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "by-hand"},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "claimRef": {"namespace": NAMESPACE, "name": "by-hand"},
                "mountOptions": ["maxConcurrency=8"],
                "csi": {
                    "driver": "csi.lazyfs.io",
                    "volumeHandle": "by-hand",
                    "readOnly": True,
                    "nodeStageSecretRef": {"name": "s3", "namespace": NAMESPACE},
                    "volumeAttributes": {"bucketName": "models", "prefix": "small/"},
                },
            },
        },
        claim("by-hand", "", volumeName="by-hand"),
        pod("reader", by_claim("by-hand")),
    )
    tenant.succeeds("reader", within_s=60)


def test_inline_volume(tenant: Tenant) -> None:
    tenant.apply(pod("reader", inline()))
    tenant.succeeds("reader", within_s=45)


def test_pod_starts_when_the_model_is_on_the_node(tenant: Tenant, driver: Driver) -> None:
    """With `waitFor: model`."""
    volume = inline("s3://models/big/", waitFor="model")
    tenant.apply(pod("reader", volume, "sleep", "infinity"))
    eventually(lambda: tenant.phase("reader") == "Running", 120, lambda: tenant.describe("reader"))
    (mount,) = json.loads(driver.exec("lazyfs", "status", "--json"))
    assert mount["prefetch"]["there_bytes"] == mount["prefetch"]["wanted_bytes"] > 4 * 48 << 20


def test_role_by_the_pods_own_token(tenant: Tenant, cluster: Cluster) -> None:
    """STS checks the token of the service account against the API server's keys."""
    role = cluster.s3.make_role(
        "reads-models", f"system:serviceaccount:{NAMESPACE}:trainer", ["models"]
    )
    account = {"apiVersion": "v1", "kind": "ServiceAccount",
               "metadata": {"name": "trainer", "namespace": NAMESPACE}}  # fmt: skip
    volume = inline("s3://models/small/", None, roleArn=role)
    tenant.apply(
        account,
        pod("reader", volume, serviceAccountName="trainer"),
        pod("stranger", volume),
    )
    tenant.succeeds("reader", within_s=60)
    # Another service account has the same right to ask, and is refused by STS.
    tenant.warned("stranger", ["role"], within_s=60)
    tenant.delete("pod", "stranger")
