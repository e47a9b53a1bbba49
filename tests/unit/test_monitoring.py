"""The dashboard and the alert rules ask for metrics and labels that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lazyfs.observe.metrics import METRICS

CHART = Path(__file__).parents[2] / "deploy/helm/lazyfs-csi"
ALERTS = CHART / "alerts/lazyfs.yaml"
DECLARED = {metric.name: metric for metric in METRICS}
# Added by whoever is scraped, by Prometheus, and by histograms.
ALWAYS = {"volume", "instance", "le"}


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def panels() -> list[dict[str, Any]]:
    return list(json.loads((CHART / "dashboards/lazyfs.json").read_text())["panels"])


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in rules()]


@pytest.mark.parametrize("expression", expressions())
def test_metrics_and_labels_exist(expression: str) -> None:
    used = [
        DECLARED[name.removesuffix("_bucket")] for name in re.findall(r"lazyfs_\w+", expression)
    ]
    assert used
    labels = {label for metric in used for label in metric.labels} | ALWAYS
    grouped = {
        label.strip() for group in re.findall(r"by \(([^)]*)\)", expression)
        for label in group.split(",")
    }  # fmt: skip
    assert grouped <= labels
    assert set(re.findall(r"[{,]\s*(\w+)=", expression)) <= labels
    for metric in used:
        counted = metric.kind in ("counter", "histogram")
        assert counted == bool(re.search(rf"(rate|increase)\({metric.name}", expression))


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["description"]) > 20


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (package prometheus) is missing")
def test_prometheus_takes_the_rules() -> None:
    answer = subprocess.run(
        ["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
