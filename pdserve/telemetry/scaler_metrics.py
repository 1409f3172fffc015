"""Metrics of the scaler, as a gateway was last told of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFigures:
    """One pool at the last decision: engines asked for, that serve, that are being started, and that the model finds it
    needs; pressure: the worst signal ÷ its target."""

    role: str
    wanted: int
    ready: int
    warming: int
    need: float
    pressure: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerFigures:
    """decisions: (speed, rule, how many). failures: (error code, how many). reloads: (result, how many) of the policy's
    file. All since the scaler started. blind: it does not see its pools. refused: the file is wrong, and an earlier
    policy holds."""

    pools: tuple[PoolFigures, ...] = ()
    decisions: tuple[tuple[str, str, int], ...] = ()
    failures: tuple[tuple[str, int], ...] = ()
    reloads: tuple[tuple[str, int], ...] = ()
    bypass_below: int = 0
    dry_run: bool = False
    blind: bool = False
    refused: bool = False


SCALER_METRICS = (
    ("pdserve_scaler_engines", "gauge", "Engines of a pool, wanted, ready and warming.", ("role", "kind")),
    ("pdserve_scaler_needed_engines", "gauge", "Engines a pool needs by forecast and model, a fraction.", ("role",)),
    ("pdserve_scaler_pressure", "gauge", "A pool's worst signal divided by its target.", ("role",)),
    (
        "pdserve_scaler_bypass_below_tokens",
        "gauge",
        "Prompts with fewer uncached tokens are read by decode engines while prefill is short; 0: as routing says.",
        (),
    ),
    ("pdserve_scaler_dry_run", "gauge", "1 while the policy only notes what it would do.", ()),
    ("pdserve_scaler_blind", "gauge", "1 while the scaler does not see its pools, so that it decides nothing.", ()),
    (
        "pdserve_scaler_policy_refused",
        "gauge",
        "1 while the policy file is wrong, so that an earlier policy holds.",
        (),
    ),
    (
        "pdserve_scaler_decisions_total",
        "counter",
        "Decisions by speed and the rule that settled them.",
        ("speed", "rule"),
    ),
    ("pdserve_scaler_failures_total", "counter", "Decisions that could not be carried out, by error code.", ("code",)),
    (
        "pdserve_scaler_policy_reloads_total",
        "counter",
        'Changes of the policy file, "ok" or "refused": then the policy before it stays in force.',
        ("result",),
    ),
)
"""(name, kind, documentation, labels)"""


LEADER = "pdserve_scaler_leader", "Of `pdserve scale` alone: 1 while this is the one that acts."
"""(name, documentation) of a gauge."""


class ScalerCollector(Collector):
    """Reads the figures anew at every scrape; there are none without a scaler."""

    def __init__(self, figures: Callable[[], ScalerFigures | None]) -> None:
        self._figures = figures

    def describe(self) -> Iterator[Metric]:
        return iter(_families())

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        if figures is None:
            return
        families = _families()
        engines, need, pressure, bypass, dry_run, blind, refused, decisions, failures, reloads = families
        for pool in figures.pools:
            for kind in ("wanted", "ready", "warming"):
                engines.add_metric([pool.role, kind], getattr(pool, kind))
            need.add_metric([pool.role], pool.need)
            pressure.add_metric([pool.role], pool.pressure)
        bypass.add_metric([], figures.bypass_below)
        dry_run.add_metric([], figures.dry_run)
        blind.add_metric([], figures.blind)
        refused.add_metric([], figures.refused)
        for speed, rule, count in figures.decisions:
            decisions.add_metric([speed, rule], count)
        for code, count in figures.failures:
            failures.add_metric([code], count)
        for result, count in figures.reloads:
            reloads.add_metric([result], count)
        yield from families


def _families() -> tuple[GaugeMetricFamily | CounterMetricFamily, ...]:
    kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
    return tuple(
        kinds[kind](name.removesuffix("_total"), documentation, labels=labels)
        for name, kind, documentation, labels in SCALER_METRICS
    )
