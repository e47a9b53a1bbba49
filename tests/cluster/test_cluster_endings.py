"""What is left when pods, claims and keys go."""

from __future__ import annotations

from cluster import eventually
from driver import Driver
from tenant import NAMESPACE, WATCH, Tenant, by_claim, claim, inline, pod, secret, storage_class


def test_last_pod_of_a_claim_unstages_it(tenant: Tenant, driver: Driver) -> None:
    """The claim stays; its daemon, mounts and memory do not, and it can be used again."""
    tenant.apply(
        claim("small", source="s3://models/small/"),
        pod("one", by_claim("small"), *WATCH),
        pod("two", by_claim("small"), *WATCH),
    )
    tenant.reads_on("one", "two")
    tenant.delete("pod", "one")
    tenant.reads_on("two")
    tenant.delete("pod", "two")
    eventually(lambda: not driver.left(), 20, driver.left)
    tenant.apply(pod("three", by_claim("small")))
    tenant.succeeds("three")


def test_volumes_that_share_a_daemon_end_one_by_one(tenant: Tenant, driver: Driver) -> None:
    """Two claims and an inline volume of one source, in the order in which they were made."""
    tenant.apply(
        claim("first", source="s3://models/small/"),
        claim("second", source="s3://models/small/"),
        pod("a", by_claim("first"), *WATCH),
        pod("b", by_claim("second"), *WATCH),
        pod("c", inline(), *WATCH),
    )
    tenant.reads_on("a", "b", "c")
    assert len(staged(driver)) == 2
    tenant.delete("pod", "a")
    eventually(lambda: len(staged(driver)) == 1, 20, lambda: f"staged: {staged(driver)}")
    tenant.reads_on("b", "c")
    tenant.delete("pod", "b")
    eventually(lambda: not staged(driver), 20, lambda: f"staged: {staged(driver)}")
    tenant.reads_on("c")
    tenant.delete("pod", "c")
    eventually(lambda: not driver.left(), 20, driver.left)


def staged(driver: Driver) -> list[str]:
    """Directories of kubelet for volumes that are staged."""
    return [it for it in driver.found().places if "/kubernetes.io/csi/csi.lazyfs.io/" in it]


def test_claim_that_is_deleted_takes_its_volume_along(tenant: Tenant, driver: Driver) -> None:
    """And the driver's record of it; what is in S3 stays."""
    tenant.apply(claim("small", source="s3://models/small/"))
    tenant.bound("small")
    claimed = tenant.cluster.get("pvc", "small", NAMESPACE)
    assert claimed is not None
    volume = claimed["spec"]["volumeName"]
    assert records(driver)
    tenant.delete("pvc", "small")
    eventually(
        lambda: tenant.cluster.get("pv", volume, "") is None, 30, "the PersistentVolume stays"
    )
    assert not records(driver)
    listing = driver.cluster.s3.client.list_objects_v2(Bucket="models", Prefix="small/")
    assert listing["KeyCount"] == 5


def records(driver: Driver) -> list[str]:
    selector = "app.kubernetes.io/managed-by=csi.lazyfs.io"
    found = driver.cluster.list("configmaps", "lazyfs", selector)
    return [each["metadata"]["name"] for each in found]


def test_secret_is_rotated_without_a_pod(tenant: Tenant, driver: Driver) -> None:
    """The old key is refused by S3; the next pod reads with the new one."""
    s3 = driver.cluster.s3
    key = s3.make_user("rotated-idle", ["models"])
    tenant.apply(
        secret("other", key),
        storage_class("rotating", "other", source="s3://models/small/"),
        claim("small", "rotating"),
        pod("before", by_claim("small")),
    )
    tenant.succeeds("before")
    tenant.delete("pod", "before")
    eventually(lambda: not driver.left(), 30, driver.left)
    tenant.apply(secret("other", s3.new_key("rotated-idle")), pod("after", by_claim("small")))
    tenant.succeeds("after")


def test_secret_is_rotated_under_a_pod(tenant: Tenant, driver: Driver) -> None:
    """Another pod of the same claim on the same node reads with the new key; so does the first."""
    s3 = driver.cluster.s3
    key = s3.make_user("rotated-busy", ["models"])
    tenant.apply(
        secret("other", key),
        storage_class("rotating", "other", source="s3://models/small/"),
        claim("small", "rotating"),
        pod("first", by_claim("small"), *WATCH),
        pod("first-inline", inline(secret="other"), *WATCH),
    )
    tenant.reads_on("first", "first-inline")
    tenant.apply(secret("other", s3.new_key("rotated-busy")))
    tenant.apply(pod("next-inline", inline("s3://models/small/", secret="other")))
    tenant.succeeds("next-inline", within_s=60)
    tenant.reads_on("first", "first-inline")


def test_wrong_secret_is_corrected_while_a_pod_waits(tenant: Tenant, driver: Driver) -> None:
    """The pod starts by itself."""
    good = tenant.cluster.s3.make_user("corrected", ["models"])
    wrong = {**good, "secretAccessKey": "this-is-another-key"}
    tenant.apply(
        secret("other", wrong),
        storage_class("correcting", "s3", "other", source="s3://models/small/"),
        claim("small", "correcting"),
        pod("by-claim", by_claim("small")),
        pod("inline", inline(secret="other")),
    )
    for name in ("by-claim", "inline"):
        tenant.warned(name, ["key"], within_s=60)
    tenant.apply(secret("other", good))
    # kubelet waits twice as long after each failure, up to two minutes.
    tenant.succeeds("by-claim", "inline", within_s=150)


def test_chart_is_uninstalled_under_a_pod(tenant: Tenant, driver: Driver) -> None:
    """The pod can be deleted when the driver is back; nothing of it stays."""
    tenant.apply(pod("reader", inline(), *WATCH))
    tenant.reads_on("reader")
    driver.uninstall()
    try:
        eventually(lambda: not driver.workers(), 60, "workers run on")
    finally:
        driver.upgrade()
    tenant.delete("pod", "reader", within_s=60)


def test_node_is_drained(tenant: Tenant, driver: Driver) -> None:
    """While S3 is there; all pods of users leave, volumes are unstaged."""
    tenant.apply(
        claim("small", source="s3://models/small/"),
        pod("by-claim", by_claim("small"), *WATCH),
        pod("inline", inline(), *WATCH),
    )
    tenant.reads_on("by-claim", "inline")
    try:
        tenant.cluster.kubectl(
            "drain", "node1", "--ignore-daemonsets", "--force", "--delete-emptydir-data",
            "--pod-selector=!app.kubernetes.io/component", "--timeout=60s", timeout_s=90,
        )  # fmt: skip
        eventually(lambda: not driver.left(), 30, driver.left)
    finally:
        tenant.cluster.kubectl("uncordon", "node1")
