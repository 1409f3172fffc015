"""Engines by policy against a pool that stays and against a plain rule: `python -m benchmarks.autoscaling TRACE…`.

In the simulator, with at most 64 engines. The load is a trace's requests in its order, with its lengths and shared
prefixes, arriving by chance at a rate that triples and falls back; a trace too short for that begins again, with
prefixes of its own each time. Three rules serve the same requests:

* static: the most engines there may be, all the time.
* hpa: as Kubernetes' horizontal autoscaler does by default: every 15 s, engines · (busy share ÷ 0.7) for prefill and
  engines · (KV in use ÷ 0.7) for decode, nothing within 10 %, at most the double at a time, and down only to the most
  of what was found in the last 5 minutes.
* ours: the policy below.

The profile is slow on purpose: minutes of a load that keeps 64 engines busy must be served in minutes of Python.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from random import Random

import structlog

from pdserve.config.times import Times
from pdserve.core.endpoint import EngineState, Role
from pdserve.router.admission import AdmissionRules
from pdserve.scaler import controller
from pdserve.scaler.bounds import most_wanted, note
from pdserve.scaler.controller import Now, Outcome
from pdserve.scaler.decision import Decision, Replicas, Scale
from pdserve.scaler.demand import Demand
from pdserve.scaler.memory import Memory, PoolMemory
from pdserve.scaler.policy import Policy
from pdserve.scaler.runner import Decide
from pdserve.simulator.profile import PRESETS, KVShape, Links, Profile, StepCost
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.scaling import ScalingSpec
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import TraceEntry, read_trace

TTFT, TPOT = 30.0, 0.1
"""Mooncake's objectives for a 70B on A800s (FAST '25): first token within 30 s, tokens within 100 ms."""
SHAPE = ((100.0, 1.0, 1.0), (60.0, 1.0, 3.0), (120.0, 3.0, 3.0), (60.0, 3.0, 1.0), (160.0, 1.0, 1.0))
"""(seconds, rate at the beginning, rate at the end), in multiples of the base rate."""
WARM_UP = 45.0
_FRESH = 2**20
"""Hash ids of one round of a trace are below this."""

PROFILE = Profile(
    name="a800x2-70b",
    basis="roofline model of a 70B in 8-bit weights on two A800 of 2.0 TB/s and 312 TFLOP/s; not measured",
    step=StepCost(base=2.5e-2, per_token=4.5e-4, per_context=1.0e-7, per_pair=1.05e-8, host=1e-3),
    kv=KVShape(num_layers=80, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    links=Links(latency=1e-4, bandwidth=25e9),
    kv_tokens=244_000,
    max_model_len=131_072,
    pools=PRESETS["h200-8b"].pools,
)

MIXES = {"conversation": (48, 16, 1.4), "synthetic": (48, 16, 1.7), "arxiv1000": (48, 16, 2.4)}
"""Trace → prefill and decode engines at most, and the base rate per second. Fixed beforehand by the static pool: its
prefill engines are busy for about 0.7 of the time at the triple rate."""


FORECAST = {"bin": 5.0, "half_life": 10.0, "trend_half_life": 10.0}
"""Of a load that may triple while an engine starts: quick to see a trend."""
MARGINS = {"prefill": 0.6, "decode": 0.5}
"""Share that is kept in hand beyond what is expected."""
DECODE_UP = {"window": 10.0}
"""A burst of arrivals passes before its answers need room; what is wanted for two looks is meant."""
KV_TARGETS = {"kv_occupancy": 0.6}
"""A single prompt may take half the KV of an engine, and finds no room where the average is much above that."""
DRAIN_TIMEOUT = 240.0
"""More than the longest prompt takes."""


def policy(prefill: int, decode: int) -> Policy:
    def pool(name: str, most: int, up: dict[str, float], **targets: float) -> dict[str, object]:
        paces = {"up": up, "down": {"cooldown": 5.0, "window": 20.0}}
        forecast = {**FORECAST, "margin": MARGINS[name]}
        return {"min": 2, "max": most, "warm_up": WARM_UP, **paces, "forecast": forecast, "targets": targets}

    return Policy.model_validate_json(
        json.dumps(
            {
                "interval": 5.0,
                "slo": {"ttft": {"seconds": TTFT}, "tpot": {"seconds": TPOT}, "handoff_gap": {"seconds": 2.0}},
                "pools": {
                    "prefill": pool("prefill", prefill, {}, backlog_seconds=3.0),
                    "decode": pool("decode", decode, DECODE_UP, **KV_TARGETS),
                },
                "total": prefill + decode,
                "flip": {"enabled": True},
            }
        )
    )


def entries(path: Path, base: float, seed: int) -> Iterator[TraceEntry]:
    """The trace's requests at the times of SHAPE, by an inhomogeneous Poisson process (thinning)."""
    rows = read_trace(path)
    rng, at, count = Random(seed), 0.0, 0
    most = base * max(max(first, last) for _, first, last in SHAPE)
    while at < sum(seconds for seconds, _, _ in SHAPE):
        at += rng.expovariate(most)
        if rng.random() * most < base * rate_at(at):
            turn, place = divmod(count, len(rows))
            count += 1
            row = rows[place]
            yield replace(row, at=at, hash_ids=tuple(turn * _FRESH + hash_id for hash_id in row.hash_ids))


def rate_at(at: float) -> float:
    """By SHAPE, in multiples of the base rate."""
    for seconds, first, last in SHAPE:
        if at < seconds:
            return first + (last - first) * at / seconds
        at -= seconds
    return 0.0


class Hpa:
    """Kubernetes' horizontal pod autoscaler with its defaults, one per pool, as scaler.runner.Decide."""

    EVERY, TARGET, TOLERANCE, WINDOW = 15.0, 0.7, 0.1, 300.0

    def __init__(self) -> None:
        self._busy: dict[str, float] = {}
        self._at = 0.0

    def __call__(
        self, policy: Policy, memory: Memory, demand: Demand, cloud: Mapping[Role, Replicas], now: Now
    ) -> Outcome:
        if now.monotonic - self._at < self.EVERY:
            return Outcome(memory=memory, decisions=(), assessments=(), held={})
        seconds, self._at = now.monotonic - self._at, now.monotonic
        pools: dict[Role, PoolMemory] = {}
        decisions = []
        for role, pool in policy.pools.by_role().items():
            current = cloud[role].wanted
            ratio = self._signal(role, demand, seconds) / self.TARGET
            desired = current if abs(ratio - 1.0) <= self.TOLERANCE else ceil(current * min(ratio, 2.0))
            desired = min(pool.max, max(pool.min, desired))
            pools[role] = kept = note(memory.pool(role), pool, desired, current, now.monotonic, self.WINDOW)
            target = desired if desired > current else min(current, most_wanted(kept, self.WINDOW, now.monotonic))
            if target != current:
                action = Scale(role=role, engines=target, before=current)
                decisions.append(Decision(at=now.unix, action=action, rule="hpa", reason=f"{ratio:.2f} of the target"))
        self._busy = {facts.engine_id: facts.busy_seconds for facts in demand.engines}
        return Outcome(memory=replace(memory, pools=pools), decisions=tuple(decisions), assessments=(), held={})

    def _signal(self, role: Role, demand: Demand, seconds: float) -> float:
        engines = [f for f in demand.engines if f.role is role and f.state is EngineState.READY and f.kv_total]
        if not engines:
            return 0.0
        if role is Role.DECODE:
            return sum(facts.kv_used for facts in engines) / sum(facts.kv_total for facts in engines)
        busy = (facts.busy_seconds - self._busy.get(facts.engine_id, 0.0) for facts in engines)
        return sum(busy) / seconds / len(engines)


RULES: dict[str, Callable[[], Decide] | None] = {"static": None, "hpa": Hpa, "ours": lambda: controller.decide}


def serve(name: str, path: Path, rule: str, seed: int) -> SimulationReport:
    prefill, decode, base = MIXES[name]
    decide = RULES[rule]
    most = {Role.PREFILL: prefill, Role.DECODE: decode}
    scaling = ScalingSpec(policy=policy(prefill, decode), warm_up=WARM_UP, decide=decide()) if decide else None
    spec = SimulationSpec(
        profile=PROFILE,
        engines={role: ceil(count / 3) for role, count in most.items()} if scaling else most,
        block_size=512,
        seed=seed,
        times=Times(drain_timeout=DRAIN_TIMEOUT),
        admission=AdmissionRules(ttft=TTFT, tpot=TPOT),
        scaling=scaling,
    )
    return Simulation(spec).run(from_trace(entries(path, base, seed), seed=seed), slo=Slo(ttft=TTFT, tpot=TPOT))


def figures(report: SimulationReport) -> dict[str, object]:
    load = report.load
    if not (load.verdict and load.ttft and load.tpot):
        raise RuntimeError("no request was answered")
    return {
        "requests": load.requests,
        "failed": load.failed,
        "errors": load.errors,
        "attainment": round(load.verdict.attainment, 4),
        "engine_seconds": {role.value: round(s) for role, s in report.scaling.engine_seconds.items()},
        "engine_seconds_total": round(report.scaling.total_seconds),
        "ttft_p50": round(load.ttft.p50, 3),
        "ttft_p95": round(load.ttft.p95, 3),
        "tpot_p95": round(load.tpot.p95, 4),
        "prefix_hit_share": round(report.prefix_hit_share, 3),
        "rules": report.scaling.rules(),
        "timeline": timeline(
            [(round(each.at), each.role, each.ready, each.wanted) for each in report.scaling.timeline]
        ),
    }


def timeline(moments: Iterable[tuple[int, str, int, int]]) -> list[str]:
    """Of (second, role, ready, wanted), what held at the end of each ten seconds in which something changed."""
    now: dict[str, str] = {}
    lines: dict[int, str] = {}
    for second, role, ready, wanted in moments:
        now[str(role)] = f"{role} {ready}/{wanted}"
        lines[second // 10 * 10] = ", ".join(now.values())
    return [f"{second} s: {line}" for second, line in lines.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help=f"names must contain one of {', '.join(MIXES)}")
    parser.add_argument("--rule", choices=RULES, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoscaling.json")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"benchmark": "autoscaling"}
    known |= {"profile": PROFILE.model_dump(mode="json"), "slo": {"ttft": TTFT, "tpot": TPOT}, "shape": SHAPE}
    known |= {"warm_up": WARM_UP, "seed": arguments.seed}
    for path in arguments.traces:
        name = next(name for name in MIXES if name in path.name)
        prefill, decode, base = MIXES[name]
        case = known.setdefault("traces", {}).setdefault(name, {})
        case |= {"prefill": prefill, "decode": decode, "base_rate": base}
        for rule in arguments.rule or RULES:
            begun = time.monotonic()
            case[rule] = figures(serve(name, path, rule, arguments.seed))
            shown = {key: value for key, value in case[rule].items() if key != "timeline"}
            print(f"{name}, {rule}, in {time.monotonic() - begun:.0f} s: {json.dumps(shown)}", flush=True)
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
