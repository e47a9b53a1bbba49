"""The cluster that `make cluster` brought up, the driver in it, and a namespace for each test."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, eventually
from driver import Driver
from tenant import NAMESPACE, Tenant, secret, storage_class

# So long a node may take to be rid of a volume after its pod is gone.
CLEAN_WITHIN_S = 45


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    found = Cluster(Path(os.environ["LAZYFS_CLUSTER"]))
    assert found.running, "there is no cluster: make cluster"
    return found


@pytest.fixture(scope="session")
def driver(cluster: Cluster) -> Driver:
    """The driver, installed by the chart, with models in S3 and a user that may read them."""
    s3 = cluster.s3
    names = [each["UserName"] for each in s3.iam.list_users()["Users"]]
    key = s3.new_key("reader") if "reader" in names else s3.make_user("reader", ["models"])
    for prefix, shards, mebibytes in (("tiny/", 1, 2), ("small/", 3, 8), ("big/", 4, 48)):
        s3.put_model("models", prefix, shards, mebibytes)
    s3.put_model("private", "tiny/")
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        secret("s3", key),
        storage_class("chosen", allowedPrefixes="s3://models/"),
    )
    made = Driver(cluster)
    made.install()
    return made


@pytest.fixture
def tenant(request: pytest.FixtureRequest, driver: Driver) -> Iterator[Tenant]:
    """A user in an empty namespace. Afterwards nothing of a volume may be left on the node."""
    made = Tenant(driver.cluster)
    yield made
    made.clear()
    eventually(lambda: not driver.left(), CLEAN_WITHIN_S, driver.left)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for each in items:
        each.add_marker(pytest.mark.timeout(600))


class Summary:
    """What held, a line a scenario."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[str, float]] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, seconds = self.lines.get(report.nodeid, ("held", 0.0))
        if report.failed:
            outcome = "FELL SHORT" if report.when == "call" else f"FELL SHORT ({report.when})"
        elif report.skipped:
            outcome = "skipped"
        self.lines[report.nodeid] = (outcome, seconds + report.duration)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Summary(), "cluster-summary")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summary = terminalreporter.config.pluginmanager.get_plugin("cluster-summary")
    terminalreporter.section(time.strftime("scenarios on a real cluster, %Y-%m-%d"))
    for name, (outcome, seconds) in summary.lines.items():
        file, _, test = name.rpartition("/")[2].partition("::")
        group = file.removeprefix("test_cluster_").removesuffix(".py")
        scenario = test.removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"{outcome:<10} {seconds:5.0f} s  {group}: {scenario}")
