"""What one pool needs: a floor from the forecast and the performance model, and a reactive answer to signals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    engines = [facts for facts in window.engines if facts.role is role and facts.state is EngineState.READY]
    inputs: dict[str, float] = {}
    signals = _signals(role, policy, pool, window, engines)
    inputs |= {f"{name}_ratio": ratio for name, ratio in signals.items()}
    worst = max(signals, key=lambda name: signals[name], default="")
    pressure = signals.get(worst, 0.0)
    need = _need(role, policy, pool, memory, window, engines, replicas, pressure, inputs)
    low, high = pool.reactive.dead_band
    # What signals say is said of the engines that serve; those that are starting are part of the answer.
    missing = (1.0 - pool.reactive.warming_credit) * replicas.warming
    asked = ceil(replicas.ready * min(pressure, pool.reactive.clamp) + missing - _EMPTY_ENOUGH)
    inputs |= {"ready": replicas.ready, "warming": replicas.warming, "pressure": pressure}
    if pressure > high and asked > replicas.wanted:
        answer, rule = asked, worst
    elif pressure > low:
        answer, rule = replicas.wanted, "dead_band"
    else:
        answer, rule = ceil(replicas.wanted * max(pressure, 1 / pool.reactive.clamp) - _EMPTY_ENOUGH), "calm"
    floor = ceil(need - _EMPTY_ENOUGH)
    if floor >= answer:
        answer, rule = floor, "forecast"
    short = pressure > high or need > replicas.ready
    return Assessment(
        role=role,
        replicas=replicas,
        need=need,
        desired=answer,
        rule=rule,
        pressure=pressure,
        short=short,
        inputs=inputs,
    )


def _need(
    role: Role,
    policy: Policy,
    pool: PoolPolicy,
    memory: Memory,
    window: Demand,
    engines: Sequence[EngineFacts],
    replicas: Replicas,
    pressure: float,
    inputs: dict[str, float],
) -> float:
    if pool.forecast.kind == "none":
        return 0.0
    rate = forecast(memory.pool(role).series.known, pool.forecast, pool.warm_up + policy.interval)
    rate *= 1.0 + pool.forecast.margin
    inputs |= {"rate": window.arrivals / window.seconds if window.seconds else 0.0, "expected_rate": rate}
    need = 0.0
    if role is not Role.DECODE:
        need += _need_for_prompts(policy, pool, memory, window, engines, replicas, rate, inputs)
    if role is not Role.PREFILL:
        need += _need_for_tokens(policy, pool, memory, engines, rate, pressure, inputs)
    inputs["need"] = need
    return need


def _need_for_prompts(
    policy: Policy,
    pool: PoolPolicy,
    memory: Memory,
    window: Demand,
    engines: Sequence[EngineFacts],
    replicas: Replicas,
    rate: float,
    inputs: dict[str, float],
) -> float:
    like = memory.likeness
    slo = policy.slo.ttft
    own = percentile_of(like.mean_work, like.work_deviation, slo.percentile)
    target = slo.seconds * (pool.targets.slo or 1.0)
    now = inputs["rate"] * like.mean_work
    missing = max(0.0, now - replicas.ready - replicas.warming)
    standing = sum(facts.backlog_seconds for facts in engines) + window.held_seconds
    usual = max(target - own, target / 4) * replicas.ready
    load = PromptLoad(
        rate=rate,
        mean=like.mean_work,
        deviation=like.work_deviation,
        own=own,
        backlog=max(0.0, standing - usual) + missing * pool.warm_up,
        recover=pool.forecast.recover,
    )
    need = engines_for_prompts(load, target, slo.percentile)
    wait = wait_percentile(load, max(1, replicas.ready), slo.percentile)
    inputs |= {
        "prompt_seconds": like.mean_work,
        "backlog_seconds": standing,
        "predicted_ttft": min(own + wait + standing / max(1, replicas.ready), 1e6),
    }
    return need


def _need_for_tokens(
    policy: Policy,
    pool: PoolPolicy,
    memory: Memory,
    engines: Sequence[EngineFacts],
    rate: float,
    pressure: float,
    inputs: dict[str, float],
) -> float:
    like = memory.likeness
    told = [facts for facts in engines if facts.kv_total]
    load = TokenLoad(
        rate=rate,
        output=like.output,
        context=like.context,
        row_seconds=like.row_time,
        kv_token_seconds=like.kv_time,
        step=_mean_step([facts.step for facts in told]),
        kv_tokens=min((facts.kv_total for facts in told), default=0),
        max_rows=min((facts.max_rows for facts in told), default=0),
    )
    target = policy.slo.tpot.seconds * (pool.targets.slo or 1.0)
    modelled = engines_for_tokens(load, target, pool.targets.kv_occupancy or 1.0)
    # What the signals say of the present load says it of a larger one: the model knows means, they know the worst.
    growth = rate / inputs["rate"] if inputs["rate"] else 0.0
    shown = min(pressure, pool.reactive.clamp) * len(engines) * min(growth, pool.reactive.clamp)
    inputs |= {"output_tokens": like.output, "context_tokens": like.context, "modelled": modelled, "shown": shown}
    return max(modelled, shown)


def _mean_step(steps: Sequence[StepModel]) -> StepModel:
    if not steps:
        return StepModel()
    count = len(steps)
    return StepModel(
        base=sum(step.base for step in steps) / count,
        per_token=sum(step.per_token for step in steps) / count,
        per_context=sum(step.per_context for step in steps) / count,
    )


def _signals(
    role: Role, policy: Policy, pool: PoolPolicy, window: Demand, engines: Sequence[EngineFacts]
) -> dict[str, float]:
    """Name of a rule → signal ÷ target."""
    targets, slo = pool.targets, policy.slo
    signals: dict[str, float] = {}
    count = len(engines)
    if targets.slo and role is not Role.DECODE:
        signals["ttft"] = _late(window.first_tokens, slo.ttft) / targets.slo
    if targets.slo and role is not Role.PREFILL:
        signals["tpot"] = _slow(percentile(window.tpots, slo.tpot.percentile), slo.tpot.seconds * targets.slo, engines)
    if targets.slo and role is Role.DECODE:
        gap = percentile(window.handoff_gaps, slo.handoff_gap.percentile)
        signals["handoff_gap"] = gap / (slo.handoff_gap.seconds * targets.slo)
    if targets.backlog_seconds and role is not Role.DECODE and count:
        found = percentile((facts.backlog_seconds for facts in engines), _FREE) + window.held_seconds / count
        signals["backlog"] = found / targets.backlog_seconds
    if targets.kv_occupancy and role is not Role.PREFILL and count:
        total = sum(facts.kv_total for facts in engines)
        signals["kv_occupancy"] = sum(facts.kv_used for facts in engines) / total / targets.kv_occupancy if total else 0
    if targets.queue and count:
        waiting = sum(facts.waiting for facts in engines) + (window.held if role is not Role.DECODE else 0)
        signals["queue"] = waiting / count / targets.queue
    return signals


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
