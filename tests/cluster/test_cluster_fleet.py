"""The cache of the fleet, turned on by a value and off again, below pods that read."""

from __future__ import annotations

import itertools
import re
import urllib.request
from collections.abc import Iterator

import pytest
from cluster import Object, eventually
from driver import NAMESPACE, RELEASE, Driver
from objectstore import ENDPOINT
from tenant import WATCH, Tenant, inline, pod, secret

COUNT = itertools.count(1)
MODEL_BYTES = 3 * (16 << 20)


def with_fleet(driver: Driver) -> Object:
    values = driver.values()
    node = values["node"]
    return values | {
        "fleetCache": {
            "enabled": True,
            "origins": [ENDPOINT],
            "caBundle": "/authority/ca.crt",
            "size": "2GiB",
            "reserve": "1%",
            "workers": 2,
            "extraVolumes": node["extraVolumes"],
            "extraVolumeMounts": node["extraVolumeMounts"],
        }
    }


def turn_on(driver: Driver) -> None:
    driver.upgrade(values=with_fleet(driver))
    roll_out(driver)


def roll_out(driver: Driver) -> None:
    """Wait for the cache, and let DNS know its addresses, as a headless Service does."""
    driver.cluster.kubectl(
        "-n", NAMESPACE, "rollout", "status", f"daemonset/{RELEASE}-fleet", "--timeout=120s",
        timeout_s=130,
    )  # fmt: skip
    addresses = [each["status"]["podIP"] for each in driver.pods("fleet")]
    driver.cluster.resolve(f"{RELEASE}-fleet.{NAMESPACE}.svc.cluster.local", addresses)


@pytest.fixture
def fleet(driver: Driver) -> Iterator[Driver]:
    yield driver
    driver.upgrade()


def uncached(driver: Driver) -> str:
    """A model that no scenario has read."""
    prefix = f"fleet-{next(COUNT)}/"
    driver.cluster.s3.put_model("models", prefix, shards=3, shard_mib=16)
    return f"s3://models/{prefix}"


def block_bytes(driver: Driver, name: str) -> dict[str, int]:
    """The bytes of blocks that the volume of a running pod got, by where they came from."""
    node = eventually(lambda: driver.pod("node"), 60, "no node plugin is ready")
    port = node["spec"]["containers"][0]["ports"][0]["containerPort"]
    url = f"http://{node['status']['podIP']}:{port}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, int] = {"s3": 0, "fleet": 0, "disk": 0}
    volume = volume_of(lines, name)
    for line in lines:
        if line.startswith("lazyfs_block_bytes_total{") and f'volume="{volume}"' in line:
            source = re.search(r'source="(\w+)"', line)
            assert source
            found[source[1]] += int(float(line.rpartition(" ")[2]))
    return found


def volume_of(lines: list[str], name: str) -> str:
    for line in lines:
        if line.startswith("lazyfs_volume_pod_info{") and f'pod="{name}"' in line:
            found = re.search(r'volume="([^"]*)"', line)
            assert found
            return found[1]
    raise AssertionError(f"no metric names the pod {name}")


def test_on_and_off_below_running_pods(tenant: Tenant, fleet: Driver) -> None:
    tenant.apply(pod("before", inline(uncached(fleet)), *WATCH))
    tenant.reads_on("before", within_s=90)
    assert block_bytes(fleet, "before")["s3"] >= MODEL_BYTES
    turn_on(fleet)
    tenant.reads_on("before")

    source = uncached(fleet)
    tenant.apply(pod("through", inline(source), *WATCH))
    tenant.reads_on("through", within_s=90)
    got = block_bytes(fleet, "through")
    assert got["fleet"] >= MODEL_BYTES and got["s3"] == 0, got

    # Its container ends, and so does the door, for as long as kubelet needs.
    pids = [*fleet.pids("lazyfs fleet-cache"), *fleet.pids("nginx: ")]
    # Some end with the first one before it is their turn.
    fleet.cluster.on_node("kill", "-9", *map(str, pids), succeeds_with=(0, 1))
    tenant.reads_on("before", "through")
    roll_out(fleet)

    fleet.upgrade()
    eventually(lambda: not fleet.pods("fleet"), 90, "the cache's pod stays")
    tenant.reads_on("before", "through")
    tenant.apply(pod("after", inline(uncached(fleet)), *WATCH))
    tenant.reads_on("after", within_s=90)
    got = block_bytes(fleet, "after")
    assert got["s3"] >= MODEL_BYTES and got["fleet"] == 0, got


def test_volumes_may_do_without_and_tenants_get_what_s3_lets_them(
    tenant: Tenant, fleet: Driver
) -> None:
    """What a reader brought onto the shelf, a tenant whom S3 lets only list does not get."""
    turn_on(fleet)
    # A door that has just started may not know its shelves yet; then S3 is asked.
    for attempt in range(5):
        name, source = f"through-{attempt}", uncached(fleet)
        tenant.apply(pod(name, inline(source), *WATCH))
        tenant.reads_on(name, within_s=90)
        got = block_bytes(fleet, name)
        if got["fleet"] >= MODEL_BYTES:
            break
    assert got["fleet"] >= MODEL_BYTES, got
    own = uncached(fleet)
    tenant.apply(pod("without", inline(own, fleetCache="off"), *WATCH))
    tenant.reads_on("without", within_s=90)
    got = block_bytes(fleet, "without")
    assert got["s3"] >= MODEL_BYTES and got["fleet"] == 0, got

    s3 = fleet.cluster.s3
    names = [each["UserName"] for each in s3.iam.list_users()["Users"]]
    known = "lister" in names
    key = s3.new_key("lister") if known else s3.make_user("lister", ["models"], may_read=False)
    tenant.apply(secret("lister", key), pod("lister", inline(source, secret="lister")))
    eventually(lambda: tenant.phase("lister") == "Failed", 90, lambda: tenant.describe("lister"))
    assert "Permission denied" in tenant.logs("lister"), tenant.describe("lister")
