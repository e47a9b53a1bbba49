"""Metrics are declared as Prometheus wants them, and documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lazyfs.observe.exposition import exposition
from lazyfs.observe.histogram import Histogram
from lazyfs.observe.metrics import METRICS, Values, histogram_value

ROOT = Path(__file__).parents[2]


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"lazyfs_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
        if metric.kind == "histogram":
            assert metric.name.endswith("_seconds")


def test_the_page_has_the_table() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs/make_metrics.py", "--print"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made == (ROOT / "docs/OBSERVABILITY.md").read_text(), "run: make docs"


def test_values_of_several_mounts_of_several_versions() -> None:
    histogram = Histogram((0.5, 1.0))
    histogram.observe(0.7)
    mine: Values = {
        "lazyfs_up": [({}, 1)],
        "lazyfs_s3_request_duration_seconds": [({"operation": "get"}, histogram_value(histogram))],
    }
    theirs: Values = {"lazyfs_up": [({}, 0)], "lazyfs_of_tomorrow": [({}, 1)]}
    text = exposition([({"volume": 'a"b\n'}, mine), ({"volume": "c"}, theirs)])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {"lazyfs_up", "lazyfs_s3_request_duration_seconds"}
    assert {s.labels["volume"]: s.value for s in families["lazyfs_up"].samples} == {
        'a"b\n': 1,
        "c": 0,
    }
    buckets = {
        sample.labels["le"]: sample.value
        for sample in families["lazyfs_s3_request_duration_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert buckets == {"0.5": 0, "1.0": 1, "+Inf": 1}


def test_no_mounts() -> None:
    assert exposition([]) == ""
