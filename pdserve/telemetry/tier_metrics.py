"""Metrics of the tiers below each engine's device pool, from the engines' load reports."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pdserve.core.cluster import EngineView
from pdserve.core.tiers import TierTally

_Samples = Callable[[TierTally], Iterable[tuple[tuple[str, ...], float]]]


class _TierMetric(NamedTuple):
    """labels begin with engine and tier; samples gives the values of the labels after those."""

    name: str
    kind: str
    documentation: str
    labels: tuple[str, ...]
    samples: _Samples


TIER_METRICS = (
    _TierMetric(
        "pdserve_kv_tier_blocks",
        "gauge",
        'KV blocks a tier holds ("held") and has room for ("capacity").',
        ("engine", "tier", "state"),
        lambda tally: ((("held",), tally.blocks), (("capacity",), tally.capacity)),
    ),
    _TierMetric(
        "pdserve_kv_tier_saved_bytes_total",
        "counter",
        "Bytes of KV written to a tier.",
        ("engine", "tier"),
        lambda tally: (((), tally.saved_bytes),),
    ),
    _TierMetric(
        "pdserve_kv_tier_restored_bytes_total",
        "counter",
        "Bytes of KV brought back from a tier and verified.",
        ("engine", "tier"),
        lambda tally: (((), tally.restored_bytes),),
    ),
    _TierMetric(
        "pdserve_kv_tier_hits_total",
        "counter",
        "KV blocks brought back from a tier instead of being computed.",
        ("engine", "tier"),
        lambda tally: (((), tally.restored_blocks),),
    ),
    _TierMetric(
        "pdserve_kv_tier_evictions_total",
        "counter",
        'KV blocks that left a full tier ("evicted") or were not let in ("refused").',
        ("engine", "tier", "reason"),
        lambda tally: ((("evicted",), tally.evicted), (("refused",), tally.refused)),
    ),
    _TierMetric(
        "pdserve_kv_tier_errors_total",
        "counter",
        'KV blocks lost because they did not verify ("corrupt") or could not be read or written ("io").',
        ("engine", "tier", "cause"),
        lambda tally: ((("corrupt",), tally.corrupt), (("io",), tally.failed)),
    ),
)
"""Counters start at 0 with each engine process."""


def tier_families(views: Iterable[EngineView]) -> Iterator[Metric]:
    """One family per metric, with a sample for every tier of every engine that has reported."""
    tallies = [(view.endpoint.engine_id, tally) for view in views if view.load for tally in view.load.tiers]
    for name, kind, documentation, labels, samples in TIER_METRICS:
        family = (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(name, documentation, labels=labels)
        for engine_id, tally in tallies:
            for values, number in samples(tally):
                family.add_metric([engine_id, tally.tier, *values], number)
        yield family
