"""One exposition of what several processes have counted."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, str, Labels]
"""(family, sample, labels)"""
Samples = tuple[tuple[Series, float], ...]

_CREATED = "_created"
"""Ends the sample that says since when something is counted; it cannot be added up."""


class Growth:
    """By how much a registry's metrics have grown since the last call, for another process to add to its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._told: dict[Series, float] = {}

    def __call__(self) -> Samples:
        before, self._told = self._told, dict(_samples(self._registry))
        grown = ((series, value - before.get(series, 0.0)) for series, value in self._told.items())
        return tuple((series, more) for series, more in grown if more)


class Totals(Collector):
    """A registry's metrics with those of other processes added."""

    def __init__(self, registry: CollectorRegistry, others: Mapping[Series, float]) -> None:
        self._registry = registry
        self._others: dict[str, dict[tuple[str, Labels], float]] = defaultdict(dict)
        for (family, sample, labels), value in others.items():
            self._others[family][sample, labels] = value

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            others = dict(self._others[family.name])
            total = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                more = others.pop((sample.name, tuple(sample.labels.items())), 0.0)
                total.add_sample(sample.name, sample.labels, sample.value + more)
            for (name, labels), value in others.items():
                total.add_sample(name, dict(labels), value)
            yield total


def _samples(registry: CollectorRegistry) -> Iterator[tuple[Series, float]]:
    for family in registry.collect():
        for sample in family.samples:
            if not sample.name.endswith(_CREATED):
                yield (family.name, sample.name, tuple(sample.labels.items())), sample.value
