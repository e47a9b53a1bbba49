"""Values of metrics as the text that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lazyfs.observe.metrics import METRICS, Declared, Values


def exposition(mounts: Iterable[tuple[Mapping[str, str], Values]]) -> str:
    """The text that Prometheus scrapes.

    Args:
        mounts: of each mount, the labels that say which it is, and its values. All have the same
            label names.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Mounts(list(mounts)))
    return generate_latest(registry).decode()


class _Mounts(Collector):
    def __init__(self, mounts: list[tuple[Mapping[str, str], Values]]) -> None:
        self._mounts = mounts

    def collect(self) -> Iterator[Metric]:
        for declared in METRICS:
            family = self._family(declared)
            if family.samples:
                yield family

    def _family(self, declared: Declared) -> Metric:
        """One metric of all mounts. A mount's worker may be of another version: what it does not
        know is missing, what this process does not know is left out."""
        whose = list(self._mounts[0][0]) if self._mounts else []
        names = [*whose, *declared.labels]
        family: Metric = _FAMILIES[declared.kind](declared.name, declared.help, labels=names)
        for labels, values in self._mounts:
            for own, value in values.get(declared.name, ()):
                texts = [labels[name] for name in whose]
                texts += [own.get(name, "") for name in declared.labels]
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
