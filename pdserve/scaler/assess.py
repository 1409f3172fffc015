"""What one pool needs: a floor from the forecast and the performance model, and a reactive answer to signals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import EngineState, Role
from pdserve.scaler.capacity import (
    PromptLoad,
    TokenLoad,
    engines_for_prompts,
    engines_for_tokens,
    percentile_of,
    wait_percentile,
)
from pdserve.scaler.decision import Replicas
from pdserve.scaler.demand import Demand, EngineFacts, FirstToken
from pdserve.scaler.forecast import forecast
from pdserve.scaler.memory import Memory
from pdserve.scaler.policy import Objective, Policy, PoolPolicy

RULES = ("forecast", "ttft", "handoff_gap", "tpot", "backlog", "kv_occupancy", "queue", "calm", "dead_band")
"""What may settle how many engines a pool should have, before bounds and paces."""
_EMPTY_ENOUGH = 1e-9
_FREE = 25.0
"""Percentile of the engines' backlogs that a new prompt finds, for it goes to one that has little."""
_SHORT = 0.5
"""Of the TTFT target, what a prompt may take by itself to tell how long others made it wait."""
_LONGEST_TOLD = 1e6
"""Seconds of a predicted TTFT: one that has no end is told as this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """One pool. need: engines by the model, a fraction. desired: with the signals' answer. rule: which of RULES settled
    it. pressure: the worst signal ÷ its target; short: more than the dead band allows, whatever is being started."""

    role: Role
    replicas: Replicas
    need: float
    desired: int
    rule: str
    pressure: float
    short: bool
    inputs: Mapping[str, float]


def assess(role: Role, policy: Policy, memory: Memory, replicas: Replicas) -> Assessment:
    pool = policy.pools.by_role()[role]
    window = memory.window
    engines = tuple(e for e in window.engines if e.role is role and e.state is EngineState.READY)
    look = _Look(role, policy, pool, memory, window, engines, replicas)
    signals = look.signals()
    look.inputs.update({f"{name}_ratio": ratio for name, ratio in signals.items()})
    worst = max(signals, key=lambda name: signals[name], default="")
    pressure = signals.get(worst, 0.0)
    need = look.need(pressure)
    look.inputs.update(ready=replicas.ready, warming=replicas.warming, pressure=pressure)
    answer, rule = _answer(pool, replicas, pressure, worst)
    floor = ceil(need - _EMPTY_ENOUGH)
    if floor >= answer:
        answer, rule = floor, "forecast"
    return Assessment(
        role=role,
        replicas=replicas,
        need=need,
        desired=answer,
        rule=rule,
        pressure=pressure,
        short=pressure > pool.reactive.dead_band[1] or need > replicas.ready,
        inputs=look.inputs,
    )


def _answer(pool: PoolPolicy, replicas: Replicas, pressure: float, worst: str) -> tuple[int, str]:
    """To the signals alone, and by which rule. What they say is said of the engines that serve; those that are starting
    are part of the answer."""
    low, high = pool.reactive.dead_band
    uncredited = (1.0 - pool.reactive.warming_credit) * replicas.warming
    asked = ceil(replicas.ready * min(pressure, pool.reactive.clamp) + uncredited - _EMPTY_ENOUGH)
    if pressure > high and asked > replicas.wanted:
        return asked, worst
    if pressure > low:
        return replicas.wanted, "dead_band"
    return ceil(replicas.wanted * max(pressure, 1 / pool.reactive.clamp) - _EMPTY_ENOUGH), "calm"


@dataclass(frozen=True, slots=True)
class _Look:
    """At one pool, at one moment. inputs: the figures that were found on the way."""

    role: Role
    policy: Policy
    pool: PoolPolicy
    memory: Memory
    window: Demand
    engines: Sequence[EngineFacts]
    replicas: Replicas
    inputs: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Arrivals per second."""
        return self.window.arrivals / self.window.seconds if self.window.seconds else 0.0

    def need(self, pressure: float) -> float:
        """Engines by forecast and model, a fraction."""
        rule = self.pool.forecast
        if rule.kind == "none":
            return 0.0
        series = self.memory.pool(self.role).series
        ahead = forecast(series.known, rule, self.pool.warm_up + self.policy.interval)
        # A forecast lags behind a step; shrinking has time, so what comes now is the least to reckon with.
        expected = max(ahead, self.rate) * (1.0 + rule.margin)
        self.inputs.update(rate=self.rate, expected_rate=expected)
        need = 0.0
        if self.role is not Role.DECODE:
            need += self._need_for_prompts(expected)
        if self.role is not Role.PREFILL:
            need += self._need_for_tokens(expected, pressure)
        self.inputs["need"] = need
        return need

    def _need_for_prompts(self, expected: float) -> float:
        like, slo, replicas = self.memory.likeness, self.policy.slo.ttft, self.replicas
        slowness = like.slowness
        mean, deviation = slowness * like.mean_work, slowness * like.work_deviation
        own = percentile_of(mean, deviation, slo.percentile)
        target = slo.seconds * (self.pool.targets.slo or 1.0)
        missing = max(0.0, self.rate * mean - replicas.ready - replicas.warming)
        standing = slowness * (sum(facts.backlog_seconds for facts in self.engines) + self.window.held_seconds)
        usual = max(target - own, target / 4) * replicas.ready
        load = PromptLoad(
            rate=expected,
            mean=mean,
            deviation=deviation,
            own=own,
            backlog=max(0.0, standing - usual) + missing * self.pool.warm_up,
            recover=self.pool.forecast.recover,
        )
        ready = max(1, replicas.ready)
        predicted = own + wait_percentile(load, ready, slo.percentile) + standing / ready
        self.inputs.update(
            prompt_seconds=mean,
            slowness=slowness,
            backlog_seconds=standing,
            predicted_ttft=min(predicted, _LONGEST_TOLD),
        )
        return engines_for_prompts(load, target, slo.percentile)

    def _need_for_tokens(self, expected: float, pressure: float) -> float:
        """The larger of the model's figure and what signals say of the present load, scaled to the expected one: the
        model knows means, they know the worst."""
        like, clamp = self.memory.likeness, self.pool.reactive.clamp
        told = [facts for facts in self.engines if facts.kv_total]
        load = TokenLoad(
            rate=expected,
            output=like.output,
            context=like.context,
            row_seconds=like.row_time,
            kv_token_seconds=like.kv_time,
            step=_mean_step([facts.step for facts in told]),
            kv_tokens=min((facts.kv_total for facts in told), default=0),
            max_rows=min((facts.max_rows for facts in told), default=0),
        )
        target = self.policy.slo.tpot.seconds * (self.pool.targets.slo or 1.0)
        modelled = engines_for_tokens(load, target, self.pool.targets.kv_occupancy or 1.0)
        growth = min(expected / self.rate, clamp) if self.rate else 0.0
        shown = min(pressure, clamp) * len(self.engines) * growth
        self.inputs.update(output_tokens=like.output, context_tokens=like.context, modelled=modelled, shown=shown)
        return max(modelled, shown)

    def signals(self) -> dict[str, float]:
        """Name of a rule → signal ÷ target."""
        targets, signals = self.pool.targets, dict[str, float]()
        if targets.slo:
            signals |= self._latencies(targets.slo)
        if not self.engines:
            return signals
        count, held = len(self.engines), self.window.held if self.role is not Role.DECODE else 0
        if targets.backlog_seconds and self.role is not Role.DECODE:
            found = percentile((facts.backlog_seconds for facts in self.engines), _FREE)
            signals["backlog"] = (found + self.window.held_seconds / count) / targets.backlog_seconds
        total = sum(facts.kv_total for facts in self.engines)
        if targets.kv_occupancy and self.role is not Role.PREFILL and total:
            signals["kv_occupancy"] = sum(facts.kv_reserved for facts in self.engines) / total / targets.kv_occupancy
        if targets.queue:
            lacking = sum(facts.waiting - facts.fetching for facts in self.engines)
            signals["queue"] = (lacking + held) / count / targets.queue
        return signals

    def _latencies(self, margin: float) -> dict[str, float]:
        slo, window = self.policy.slo, self.window
        signals: dict[str, float] = {}
        if self.role is not Role.DECODE:
            signals["ttft"] = _late(window.first_tokens, slo.ttft) / margin
        if self.role is not Role.PREFILL:
            tpot = percentile(window.tpots, slo.tpot.percentile)
            signals["tpot"] = _slow(tpot, slo.tpot.seconds * margin, self.engines)
        if self.role is Role.DECODE:
            gap = percentile(window.handoff_gaps, slo.handoff_gap.percentile)
            signals["handoff_gap"] = gap / (slo.handoff_gap.seconds * margin)
        return signals


def _mean_step(steps: Sequence[StepModel]) -> StepModel:
    if not steps:
        return StepModel()
    count = len(steps)
    return StepModel(
        base=sum(step.base for step in steps) / count,
        per_token=sum(step.per_token for step in steps) / count,
        per_context=sum(step.per_context for step in steps) / count,
    )


def _slow(tpot: float, target: float, engines: Sequence[EngineFacts]) -> float:
    """What tokens take beyond an empty engine's step, which no engine more would spare, ÷ what they may."""
    base = min(_mean_step([facts.step for facts in engines if facts.kv_total]).base, 0.9 * target)
    return max(0.0, tpot - base) / (target - base)


def _late(firsts: Iterable[FirstToken], slo: Objective) -> float:
    """How much of the time that a first token may wait is waited, at the percentile: what a prompt takes by itself is
    no engine's lack, and one that takes most of the target by itself says nothing about waiting. A first token that has
    not come yet counts if it is late already."""
    shares = []
    for first in firsts:
        share = max(0.0, first.seconds - first.own) / max(slo.seconds - first.own, slo.seconds / 4)
        if first.own <= _SHORT * slo.seconds and (share > 1.0 or not first.still):
            shares.append(share)
    return percentile(shares, slo.percentile)


def percentile(values: Iterable[float], percent: float) -> float:
    """By the rank below, so that one of a few outliers does not speak for all; 0 of none."""
    ordered = sorted(values)
    return ordered[int(percent / 100 * (len(ordered) - 1) + _EMPTY_ENOUGH)] if ordered else 0.0
