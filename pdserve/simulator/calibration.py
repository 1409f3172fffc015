"""A profile from what a running deployment tells of itself: its engines' steps and its latest requests.

What the router has learned of steps becomes step costs per pool, hops between processes the latency, handoffs the cost
of a pull. What the deployment cannot show (bandwidth, the speed of digests, the quadratic part of prompts) stays as the
base profile has it. Stamps of several machines are only as good as their clocks agree.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable
from pdserve.simulator.profile import PoolSteps, Profile, StepCost

Described = Mapping[str, Any]
"""An engine of GET /admin/steps, or a request of GET /admin/requests."""
LEAST_STEPS = 30
"""Of a pool, before its costs are worth telling."""


def calibrated(base: Profile, engines: Sequence[Described], requests: Sequence[Described]) -> Profile:
    """base with the costs the deployment shows. Raises Unavailable when a pool has taken too few steps yet."""
    pools = {Role(engine["role"]) for engine in engines}
    steps = {role.value: step_cost([engine for engine in engines if engine["role"] == role]) for role in sorted(pools)}
    done = [_Moments(request) for request in requests if request["status"] == "ok" and not request["failed_attempts"]]
    latency = _mean_of_medians(
        [m.between(("gateway", "routed"), ("prompt", "queued")) for m in done],
        [m.between(("prompt", "first_token"), ("gateway", "first_token")) for m in done],
        [_half(m.between(("decode", "last_pull"), ("decode", "released"))) for m in done],
    )
    links = base.links.model_copy(update={"latency": base.links.latency if latency is None else latency})
    extra = _known(m.pull_seconds(links.latency, 1 / links.bandwidth + 2 / links.verify) for m in done)
    whole = [engine["capacity"] for engine in engines if engine["capacity"]]
    return base.model_copy(
        update={
            "basis": f"fitted to {sum(_steps(engine) for engine in engines)} steps and {len(done)} requests",
            "step": max(steps.values(), key=lambda cost: cost.base),
            "pool_steps": PoolSteps(**steps),
            "gateway": _median(m.gateway_seconds for m in done) or base.gateway,
            "links": links.model_copy(update={"per_pull": max(0.0, median(extra)) if extra else base.links.per_pull}),
            "kv_tokens": min((c["num_blocks"] * c["block_size"] for c in whole), default=base.kv_tokens),
        }
    )


def step_cost(engines: Sequence[Described]) -> StepCost:
    """What the router has learned of one pool's steps. Raises Unavailable."""
    steps = sum(_steps(engine) for engine in engines)
    if steps < LEAST_STEPS:
        raise Unavailable(f"a pool has taken {steps} steps, fewer than {LEAST_STEPS}: put load on it first")
    models = [StepModel(**engine["model"]) for engine in engines]
    return StepCost(
        base=fmean(model.base for model in models),
        per_token=fmean(model.per_token for model in models),
        per_context=fmean(model.per_context for model in models),
    )


class _Moments:
    """A finished request's stamps by actor: gateway, prompt (the engine that read it) and decode (after a handoff)."""

    def __init__(self, request: Described) -> None:
        prompt, decode = request["prefill"], request["decode"]
        self._times: dict[tuple[str, str], float] = {
            ("gateway", name): unix for name, unix in request["stamps"].items()
        }
        for actor, trace in (("prompt", prompt or decode), ("decode", decode if prompt else None)):
            self._times |= {(actor, name): unix for name, unix in trace["stamps"]} if trace else {}
        self._transfer = request["transfer"]

    def between(self, start: tuple[str, str], end: tuple[str, str]) -> float | None:
        begun, ended = self._times.get(start), self._times.get(end)
        return None if begun is None or ended is None else max(0.0, ended - begun)

    @property
    def gateway_seconds(self) -> float | None:
        before = self.between(("gateway", "arrived"), ("gateway", "routed"))
        after = self.between(("gateway", "first_token"), ("gateway", "first_sent"))
        return None if before is None else before + (after or 0.0)

    def pull_seconds(self, latency: float, per_byte: float) -> float | None:
        """What the last pull took beside messages and bytes; it began when the prompt was computed and asked for."""
        ends = [self._times.get(key) for key in (("prompt", "prompt_computed"), ("decode", "attached"))]
        last: float | None = self._times.get(("decode", "last_pull"))
        if last is None or not self._transfer or not self._transfer["pulls"]:
            return None
        begun = max(_known(ends), default=last)
        region = float(self._transfer["bytes"] / self._transfer["pulls"])
        return last - begun - 2 * latency - per_byte * region


def _steps(engine: Described) -> int:
    return sum(part["steps"] for part in engine["steps"])


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return median(known) if known else None


def _mean_of_medians(*kinds: Iterable[float | None]) -> float | None:
    medians = _known(_median(kind) for kind in kinds)
    return fmean(medians) if medians else None


def _half(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 2
