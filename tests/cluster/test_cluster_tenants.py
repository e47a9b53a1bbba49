"""Tenants that share a node, and do not trust each other (docs/SECURITY.md)."""

from __future__ import annotations

from cluster import eventually
from driver import Driver
from tenant import Tenant, inline, pod, secret

VOLUMES = 40


def test_pod_that_may_list_and_not_read_gets_nothing_that_others_have_cached(
    tenant: Tenant, driver: Driver
) -> None:
    s3 = driver.cluster.s3
    names = [each["UserName"] for each in s3.iam.list_users()["Users"]]
    key = (
        s3.new_key("lister")
        if "lister" in names
        else s3.make_user("lister", ["models"], may_read=False)
    )
    tenant.apply(pod("reader", inline()))
    tenant.succeeds("reader")
    tenant.apply(secret("lister", key), pod("lister", inline(secret="lister")))
    eventually(lambda: tenant.phase("lister") == "Failed", 60, lambda: tenant.describe("lister"))
    assert "Permission denied" in tenant.logs("lister"), tenant.describe("lister")
    tenant.apply(pod("again", inline()))
    tenant.succeeds("again")


def test_pod_with_many_volumes_leaves_room_for_another(tenant: Tenant) -> None:
    many = pod("many", inline("s3://models/tiny/"))
    many["spec"]["volumes"] += [
        {"name": f"more-{number}", **inline("s3://models/tiny/", prefetch="off")}
        for number in range(VOLUMES)
    ]
    tenant.apply(many, pod("other", inline()))
    tenant.succeeds("other", within_s=90)
    tenant.succeeds("many", within_s=180)
