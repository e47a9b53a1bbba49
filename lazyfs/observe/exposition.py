"""Metrics in the text format that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as MetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lazyfs.observe.metrics import METRICS, Metric, Values


def exposition(mounts: Iterable[tuple[Mapping[str, str], Values]]) -> str:
    """Render the metrics of several mounts.

    Args:
        mounts: for each mount, the labels that identify it, and its values. All mounts have the
            same label names.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Mounts(list(mounts)))
    return generate_latest(registry).decode()


class _Mounts(Collector):
    def __init__(self, mounts: list[tuple[Mapping[str, str], Values]]) -> None:
        self._mounts = mounts

    def collect(self) -> Iterator[MetricFamily]:
        for metric in METRICS:
            family = self._family(metric)
            if family.samples:
                yield family

    def _family(self, metric: Metric) -> MetricFamily:
        """One metric with the samples of all mounts.

        A worker may run another version of lazyfs. A metric that it does not know has no sample; a
        metric that only it knows is left out.
        """
        mount_labels = list(self._mounts[0][0]) if self._mounts else []
        names = [*mount_labels, *metric.labels]
        family: MetricFamily = _FAMILIES[metric.kind](metric.name, metric.help, labels=names)
        for labels, values in self._mounts:
            for own, value in values.get(metric.name, ()):
                texts = [labels[name] for name in mount_labels]
                texts += [own.get(name, "") for name in metric.labels]
                if isinstance(family, HistogramMetricFamily):
                    bounds = [str(float(bound)) for bound in value["bounds"]] + ["+Inf"]
                    buckets = list(zip(bounds, value["counts"], strict=True))
                    family.add_metric(texts, buckets, value["sum"])
                elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
                    family.add_metric(texts, value)
        return family


_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
