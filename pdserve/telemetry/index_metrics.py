"""Metrics of the router's KV index: how much it knows, and what it had to give up."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class IndexSizes(NamedTuple):
    """Entries of one block on one engine: announced, expected soon, and forgotten for lack of room since the start."""

    announced: int
    expected: int
    forgotten: int


INDEX_METRICS = (
    (
        "pdserve_kv_index_blocks",
        "gauge",
        'Blocks the router knows of, each once per engine: "announced" by it, or "expected" because a prompt was just '
        "sent there.",
        ("kind",),
    ),
    (
        "pdserve_kv_index_forgotten_total",
        "counter",
        "Blocks the router has forgotten, the oldest first, because it knew of more than routing.index_blocks.",
        (),
    ),
)
"""(name, kind, documentation, labels)"""


class IndexCollector(Collector):
    """Reads the sizes anew at every scrape."""

    def __init__(self, sizes: Callable[[], IndexSizes]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterator[Metric]:
        sizes = self._sizes()
        (blocks, _, documentation, labels), (forgotten, _, why, _) = INDEX_METRICS
        gauge = GaugeMetricFamily(blocks, documentation, labels=labels)
        gauge.add_metric(["announced"], sizes.announced)
        gauge.add_metric(["expected"], sizes.expected)
        yield gauge
        yield CounterMetricFamily(forgotten.removesuffix("_total"), why, value=sizes.forgotten)
