"""Goodput far above what a cluster can do: what is let in must still meet its targets, and the others hear so at once.

The load is open-loop. Its rate goes up until goodput stops growing (the peak), then to two and three times the rate of
the peak. Goodput counts complete answers that met the targets, which are fixed beforehand, per second of load.
`python -m benchmarks.overload simulated` (2 prefill and 2 decode engines) and `… real` (1 and 1); docs/admission.md.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import structlog

from benchmarks.admission_load import Gun, Seen, Shape, as_arrivals, p, seen_in, shots
from pdserve.config.load import load_config
from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.endpoint import Role
from pdserve.core.errors import Overloaded
from pdserve.router.admission import AdmissionRules
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from pdserve.simulator.profile import load_profile
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve_loadgen.client import Client
from pdserve_loadgen.endpoint import Api, Endpoint
from pdserve_loadgen.prompts import words_of
from tests.deployment import Deployment, deployed, write_config

SWEEP = (0.6, 0.8, 1.0, 1.2)
BEYOND = (2.0, 3.0)
Serve = Callable[[float, int], Awaitable[list[Seen]]]
"""(rate, seed) → what clients saw."""


class Counted(KVAware):
    """And how often it was asked."""

    chosen = 0

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        self.chosen += 1
        return super().choose(ask, state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """ttft, tpot: the targets, seconds. guess: requests per second the sweep is around; None to measure it."""

    shape: Shape
    ttft: float
    tpot: float
    seconds: float
    guess: float | None = None


SIMULATED = {
    "h200-8b": Case(shape=Shape(input=1500, output=60), ttft=2.0, tpot=0.05, seconds=8.0, guess=45.0),
    "demo-cpu": Case(shape=Shape(input=300, output=12, longest=1500), ttft=2.0, tpot=0.1, seconds=10.0, guess=36.0),
}
REAL = Case(shape=Shape(input=600, output=12, longest=1500), ttft=2.0, tpot=0.2, seconds=20.0)


async def sweep(case: Case, guess: float, serve: Serve) -> dict[str, Any]:
    rows = []
    for factor in SWEEP:
        rows.append(figures(guess * factor, await serve(guess * factor, len(rows)), case))
    peak = max(rows, key=lambda row: row["goodput"])
    for times in BEYOND:
        rate = times * peak["rate"]
        rows.append(figures(rate, await serve(rate, len(rows)), case) | {"times_peak": times})
    return {
        "case": asdict(case),
        "peak": peak,
        "rows": rows,
        "goodput_of_peak": {f"{row['times_peak']:g}x": row["goodput"] / peak["goodput"] for row in rows[len(SWEEP) :]},
    }


def figures(rate: float, seen: list[Seen], case: Case) -> dict[str, Any]:
    served = [each for each in seen if each.error is None]
    refused = [each for each in seen if each.is_refused]
    row = {
        "rate": rate,
        "requests": len(seen),
        "served": len(served),
        "refused": len(refused),
        "failed": len(seen) - len(served) - len(refused),
        "goodput": sum(each.meets(case.ttft, case.tpot) for each in seen) / case.seconds,
        "ttft": {"p50": p((each.ttft for each in served), 50), "p99": p((each.ttft for each in served), 99)},
        "tpot": {"p50": p((each.tpot for each in served), 50), "p99": p((each.tpot for each in served), 99)},
        "refusal_p99": p((each.took for each in refused), 99),
    }
    print(json.dumps(row), flush=True)
    return row


async def simulated(name: str) -> dict[str, Any]:
    """And the same three times the peak's rate, with everybody let in."""
    case = SIMULATED[name]
    rules = AdmissionRules(ttft=case.ttft, tpot=case.tpot)
    spec = SimulationSpec(
        profile=load_profile(name), engines={Role.PREFILL: 2, Role.DECODE: 2}, admission=rules, block_size=64
    )
    everybody = replace(spec, admission=replace(rules, enabled=False))
    policies: list[Counted] = []

    def counted(rules: RoutingRules) -> Counted:
        policies.append(Counted(rules))
        return policies[-1]

    async def serve(rate: float, seed: int, spec: SimulationSpec = spec) -> list[Seen]:
        plan = as_arrivals(shots(case.shape, rate, case.seconds, seed))
        return seen_in((await asyncio.to_thread(Simulation(replace(spec, policy=counted)).run, plan)).requests)

    assert case.guess is not None
    found = await sweep(case, case.guess, serve)
    beyond = found["rows"][-1]
    without = figures(beyond["rate"], await serve(beyond["rate"], len(found["rows"]) - 1, everybody), case)
    for row, policy in zip((*found["rows"], without), policies, strict=True):
        row["routes_chosen_per_request"] = policy.chosen / row["requests"]
    return found | {"without_admission": without | {"goodput_of_peak": without["goodput"] / found["peak"]["goodput"]}}


async def real() -> dict[str, Any]:
    case = REAL
    with TemporaryDirectory() as folder:
        settings = {
            "device": "cpu",
            "pools": {"prefill": {"engines": 1}, "decode": {"engines": 1}},
            "slo": {"ttft": case.ttft, "tpot": case.tpot},
        }
        path = write_config(Path(folder) / "cluster.yaml", settings)
        words = words_of(load_config(path, env={}).model_path / "tokenizer.json")
        with deployed(Path(folder) / "log", str(path)) as deployment:
            endpoint = Endpoint(
                url=deployment.url,
                model="pdserve-demo",
                api=Api.COMPLETIONS,
                extra={"ignore_eos": True, "temperature": 0},
                timeout=60,
            )
            client = Client(endpoint, time.perf_counter)
            gun = Gun({"default": client}, words)
            try:
                guess = await gun.capacity(case.shape, 12.0, 8, seed=77)
                print(json.dumps({"closed_loop_per_second": guess}), flush=True)
                found = await sweep(
                    case, guess, lambda rate, seed: gun.fire(shots(case.shape, rate, case.seconds, seed))
                )
                return found | {"refusal_at_gateway_p99": refusal_p99(deployment)}
            finally:
                await client.close()


def refusal_p99(deployment: Deployment) -> float | None:
    """Seconds from a request's arrival at the gateway to its refusal, by the gateway's own stamps."""
    answer = httpx.get(f"{deployment.admin_url}/admin/requests", params={"latest": 1000}, timeout=30)
    stamps = [record["stamps"] for record in answer.json()["requests"] if record["status"] == Overloaded.code]
    return p((each["finished"] - each["arrived"] for each in stamps), 99)


async def run(kind: str) -> dict[str, Any]:
    if kind == "real":
        return {"engines": "1p1d of the demo model on CPU", "load_average": os.getloadavg()[0], **(await real())}
    return {name: await simulated(name) for name in SIMULATED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("simulated", "real"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    result = {"benchmark": "overload", "kind": arguments.kind, "result": asyncio.run(run(arguments.kind))}
    out = arguments.out or Path(__file__).parent / "results" / f"overload_{arguments.kind}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
