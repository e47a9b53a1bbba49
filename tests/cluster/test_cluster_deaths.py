"""Something dies under pods that map a model: they see no error, except where a test says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster, eventually
from driver import NAMESPACE, RELEASE, Driver
from tenant import WATCH, Tenant, by_claim, claim, inline, pod

READERS = ("by-claim", "inline")


@pytest.fixture
def readers(tenant: Tenant) -> Iterator[Tenant]:
    """Two pods that map a model and read it again and again; they may see no error."""
    tenant.apply(
        claim("small", source="s3://models/small/"),
        pod("by-claim", by_claim("small"), *WATCH),
        pod("inline", inline(), *WATCH),
    )
    tenant.reads_on(*READERS, within_s=90)
    yield tenant


def test_worker_is_killed(readers: Tenant, driver: Driver) -> None:
    before = driver.workers()
    driver.kill(*before)
    readers.reads_on(*READERS, within_s=30)
    assert not set(before) & set(driver.workers())


def test_plugins_container_is_killed(readers: Tenant, driver: Driver) -> None:
    before = driver.pids("lazyfs-csi node")
    driver.kill(*before)
    eventually(
        lambda: driver.pids("lazyfs-csi node") not in ([], before), 60, "it is not restarted"
    )
    readers.reads_on(*READERS, within_s=60)
    driver.ready()


def test_plugins_pod_is_deleted(readers: Tenant, driver: Driver) -> None:
    driver.delete("node")
    readers.reads_on(*READERS, within_s=30)


def test_keeper_is_deleted(readers: Tenant, driver: Driver) -> None:
    driver.delete("keeper")
    readers.reads_on(*READERS, within_s=20)
    # The next keeper has the sessions: the plugin can be replaced.
    driver.delete("node")
    readers.reads_on(*READERS, within_s=30)


def test_keeper_is_killed(readers: Tenant, driver: Driver) -> None:
    before = driver.pids("csi.keeper")
    driver.kill(*before)
    eventually(lambda: driver.pids("csi.keeper") not in ([], before), 60, "it is not restarted")
    readers.reads_on(*READERS, within_s=20)
    driver.ready()


def test_kubelet_is_killed(readers: Tenant, driver: Driver) -> None:
    """The driver is registered again, and volumes can be mounted."""
    before = driver.cluster.on_node("pgrep", "-x", "kubelet")
    driver.kill(*before.split())
    readers.reads_on(*READERS, within_s=60)
    readers.apply(pod("later", inline("s3://models/tiny/")))
    readers.succeeds("later", within_s=90)


def test_containerd_is_killed(readers: Tenant, driver: Driver) -> None:
    before = driver.cluster.on_node("pgrep", "-x", "containerd")
    driver.kill(*before.split())
    readers.reads_on(*READERS, within_s=60)
    readers.apply(pod("later", inline("s3://models/tiny/")))
    readers.succeeds("later", within_s=90)


def test_upgrade_and_rollback(readers: Tenant, driver: Driver) -> None:
    """By helm; the plugin's pod is replaced both times, the keeper's is not."""
    keeper, node = driver.name("keeper"), driver.name("node")
    driver.upgrade("--set", "node.podAnnotations.version=next")
    readers.reads_on(*READERS, within_s=60)
    upgraded = driver.name("node")
    driver.cluster.helm("rollback", RELEASE, "-n", NAMESPACE)
    driver.ready()
    readers.reads_on(*READERS, within_s=60)
    assert len({node, upgraded, driver.name("node")}) == 3
    assert driver.name("keeper") == keeper


def test_keeper_and_plugin_at_once(tenant: Tenant, driver: Driver) -> None:
    """Volumes with a Secret are lost to their pods; these can be deleted and made again."""
    tenant.apply(
        claim("small", source="s3://models/small/"),
        pod("by-claim", by_claim("small"), *WATCH),
        pod("inline", inline(), *WATCH),
    )
    tenant.reads_on(*READERS, within_s=90)
    driver.delete("node", "keeper")
    for name in READERS:
        eventually(lambda name=name: tenant.phase(name) == "Failed", 60, f"{name} reads on")
    tenant.delete("pod", *READERS, within_s=40)
    tenant.apply(
        pod("by-claim", by_claim("small"), *WATCH),
        pod("inline", inline(), *WATCH),
    )
    tenant.reads_on(*READERS, within_s=90)


def forget_boot(cluster: Cluster) -> None:
    """What is recorded on the node is of another boot from now on."""
    state = cluster.run / "node" / "lib" / "kubelet" / "plugins" / "csi.lazyfs.io"
    records = [path for path in state.rglob("*.json") if "boot_id" in path.read_text()]
    assert records
    for path in records:
        fields = json.loads(path.read_text())
        fields["boot_id"] = "00000000-0000-4000-8000-000000000000"
        path.write_text(json.dumps(fields))


@pytest.mark.parametrize("boot", [None, forget_boot], ids=["same_boot_id", "new_boot_id"])
def test_power_cut(tenant: Tenant, driver: Driver, boot: Callable[[Cluster], None] | None) -> None:
    """All processes and mounts end at once. Pods that are to be restarted read again."""
    always = {"restartPolicy": "Always"}
    tenant.apply(
        claim("small", source="s3://models/small/"),
        pod("by-claim", by_claim("small"), *WATCH, **always),
        pod("inline", inline(), *WATCH, **always),
    )
    tenant.reads_on(*READERS, within_s=90)
    driver.cluster.power_cut()
    if boot is not None:
        boot(driver.cluster)
    driver.cluster.boot()
    driver.ready()
    for name in READERS:
        eventually(
            lambda name=name: restarts(tenant, name) >= 1,
            120,
            lambda name=name: tenant.describe(name),
        )
    tenant.reads_on(*READERS, within_s=90)


def restarts(tenant: Tenant, name: str) -> int:
    """How often the container was started again, and runs."""
    found = tenant.cluster.get("pod", name, "test")
    (status,) = found["status"].get("containerStatuses", [{}]) if found else ({},)
    return int(status.get("restartCount", 0)) if "running" in status.get("state", {}) else 0
