"""Every wrong input of a user: one sentence, one event with a count."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from cluster import eventually
from driver import Driver
from tenant import Tenant, by_claim, claim, inline, pod, secret, storage_class

CLAIM = "PersistentVolumeClaim"

# An inline volume, and words that the sentence must have.
VOLUMES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wrong_key": ({"secret": "wrong"}, ["secretAccessKey"]),
    "unknown_key": ({"secret": "unknown"}, ["accessKeyId"]),
    "secret_with_other_names": ({"secret": "misspelt"}, ["accessKeyId", "accessKey, secretKey"]),
    "no_such_secret": ({"secret": "absent"}, ["absent", "not found"]),
    "no_secret": ({"secret": None}, ["nodePublishSecretRef"]),
    "no_such_bucket": ({"source": "s3://no-such-bucket/tiny/"}, ["no-such-bucket"]),
    "nothing_below_the_prefix": ({"source": "s3://models/tinny/"}, ["models/tinny"]),
    "bucket_that_is_not_allowed": ({"source": "s3://private/tiny/"}, ["private", "s3:ListBucket"]),
    "no_s3_url": ({"source": "models/tiny"}, ["s3://", "models/tiny"]),
    "unknown_attribute": ({"memoryLimits": "1GiB"}, ["memoryLimits", "memoryLimit"]),
    "value_that_is_not_allowed": ({"prefetch": "everything"}, ["prefetch", "everything"]),
    "too_much_memory": ({"memoryLimit": "64GiB"}, ["memoryLimit", "2GiB"]),
    "attribute_of_the_node": ({"cacheDir": "/etc"}, ["cacheDir"]),
    "no_such_endpoint": ({"endpointUrl": "https://no-such.example"}, ["no-such.example"]),
    "endpoint_that_refuses": ({"endpointUrl": "https://10.96.0.20:9999"}, ["10.96.0.20:9999"]),
    "endpoint_without_tls": ({"endpointUrl": "http://10.96.0.20:443"}, ["10.96.0.20:443"]),
    "no_role": ({"secret": None, "roleArn": "reads-models"}, ["roleArn", "reads-models"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", VOLUMES)
def test_inline_volume_with(tenant: Tenant, driver: Driver, kind: str) -> None:
    fields, words = VOLUMES[kind]
    wrong_secrets(tenant)
    tenant.apply(pod("reader", inline(**{"source": "s3://models/tiny/", **fields})))
    reason, message, _ = tenant.warned("reader", words, within_s=60)
    assert reason == "FailedMount"
    one_event_that_counts(tenant, "reader")
    assert "Traceback" not in message
    assert len(message) < 700, message
    secrets_are_not_told(driver, message)


def wrong_secrets(tenant: Tenant) -> None:
    key = tenant.cluster.get("secret", "s3", "test")
    assert key is not None
    access = base64.b64decode(key["data"]["accessKeyId"]).decode()
    secret_key = base64.b64decode(key["data"]["secretAccessKey"]).decode()
    tenant.apply(
        secret("wrong", {"accessKeyId": access, "secretAccessKey": "this-is-another-key"}),
        secret("unknown", {"accessKeyId": "AKIANOBODY", "secretAccessKey": secret_key}),
        secret("misspelt", {"accessKey": access, "secretKey": secret_key}),
    )


def one_event_that_counts(tenant: Tenant, name: str) -> None:
    """kubelet tries again and says the same, so that it is one event."""
    eventually(
        lambda: any(count >= 3 for _, _, count in tenant.warnings(name)),
        90,
        lambda: f"an event that counts: {tenant.warnings(name)}",
    )
    messages = {message for reason, message, _ in tenant.warnings(name) if reason == "FailedMount"}
    assert len(messages) == 1, messages


def secrets_are_not_told(driver: Driver, message: str) -> None:
    logs = driver.cluster.kubectl(
        "-n", "lazyfs", "logs", driver.name("node"), "-c", "lazyfs", "--tail=-1"
    )
    for text in (message, logs):
        assert "this-is-another-key" not in text


CLAIMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bucket_of_others": ({"source": "s3://models-x/x/"}, ["s3://models-x/x/", "not allowed"]),
    "prefix_of_others": ({"source": "s3://private/tiny/"}, ["s3://private/tiny/", "not allowed"]),
    "nothing_below_the_prefix": ({"source": "s3://models/tinny/"}, ["models/tinny"]),
    "no_annotation": ({}, ["csi.lazyfs.io/source"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_claim_with(tenant: Tenant, driver: Driver, kind: str) -> None:
    fields, words = CLAIMS[kind]
    tenant.apply(claim("wrong", **fields))
    reason, message, _ = tenant.warned("wrong", words, CLAIM, within_s=60)
    assert reason == "ProvisioningFailed"
    messages = {said for why, said, _ in tenant.warnings("wrong", CLAIM) if why == reason}
    assert len(messages) == 1, messages
    assert len(message) < 700, message


@pytest.mark.parametrize("which", ["key", "secret", "bucket"])
def test_class_with_a_wrong(tenant: Tenant, which: str) -> None:
    wrong_secrets(tenant)
    key = tenant.cluster.get("secret", "wrong", "test")
    assert key is not None
    key = {"apiVersion": "v1", "kind": "Secret", "data": key["data"],
           "metadata": {"name": "other", "namespace": "test"}}  # fmt: skip
    made, words = {
        "key": (storage_class("wrong", "other", source="s3://models/tiny/"), ["secretAccessKey"]),
        "secret": (storage_class("wrong", "absent", source="s3://models/tiny/"), ["absent"]),
        "bucket": (storage_class("wrong", source="s3://no-such-bucket/x/"), ["no-such-bucket"]),
    }[which]
    tenant.apply(key, made, claim("wrong", "wrong"))
    tenant.warned("wrong", words, CLAIM, within_s=60)


def test_claim_is_annotated_after_its_first_failure(tenant: Tenant) -> None:
    """It is bound, and its pod starts, without being made again."""
    tenant.apply(claim("late"), pod("reader", by_claim("late")))
    tenant.warned("late", ["csi.lazyfs.io/source"], CLAIM)
    tenant.cluster.kubectl(
        "-n", "test", "annotate", "pvc", "late", "csi.lazyfs.io/source=s3://models/tiny/"
    )
    tenant.bound("late", within_s=60)
    tenant.succeeds("reader", within_s=60)
