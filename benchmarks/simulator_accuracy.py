"""The simulator against reality: the same requests on 2 prefill + 2 decode engines, real ones and simulated ones.

Two parts, on both sides: strangers, from which the profile is calibrated; after a pause in which that load fades from
the router's memory, the measured conversations. Compared are each measured request's route, and the distributions of
TTFT and TPOT. docs/simulator.md says what the figures mean.
"""

import argparse
import asyncio
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.accuracy_report import Pick, compared, pick_of, render
from benchmarks.conversation_trace import conversations, shifted, strangers
from benchmarks.other_load import Moment, others_cores
from pdserve.cli.calibrate import base_profile
from pdserve.config.load import load_config
from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.endpoint import Role
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from pdserve.simulator.calibration import calibrated
from pdserve.simulator.profile import Profile
from pdserve.simulator.report import SimulatedRequest
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.client import Client
from pdserve_loadgen.endpoint import Api, Endpoint
from pdserve_loadgen.prompts import PromptWriter, Sizing, words_of
from pdserve_loadgen.result import Outcome, RequestResult
from pdserve_loadgen.runner import Runner
from pdserve_loadgen.traces import TraceEntry
from pdserve_loadgen.workload import replay
from tests.deployment import Deployment, deployed, write_config

ENGINES = {Role.PREFILL: 2, Role.DECODE: 2}
POOLS = {"prefill": {"engines": 2}, "decode": {"engines": 2}}
STRANGERS = 72
BREATH = 5.0
"""Seconds after the strangers' last arrival in which answers end and heartbeats tell of them."""
HEARTBEAT = 1.5
"""Seconds after which engines have told of their last steps."""
FORGETTING = 150.0
"""The pause before the conversations: five time constants of the router's memory of recent work."""


@dataclass(frozen=True)
class Workload:
    """entries[begin:] are measured. calibrate_at: when all before have been answered, in seconds."""

    entries: list[TraceEntry]
    begin: int
    calibrate_at: float

    @classmethod
    def of(cls, requests: int, rate: float, seed: int) -> "Workload":
        before = strangers(STRANGERS, rate, seed)
        calibrate_at = before[-1].at + BREATH
        measured = shifted(conversations(requests, rate, seed), calibrate_at + FORGETTING)
        return cls(before + measured, len(before), calibrate_at)


@dataclass(frozen=True)
class Reality:
    """What the deployment did: results and records by place in the workload, the profile it suggested before the
    measured part; each engine's share of that part spent in steps; how many cores others used by part."""

    results: dict[int, RequestResult]
    records: dict[int, dict[str, Any]]
    profile: Profile
    busy: dict[str, float]
    others: dict[str, float]


async def serve(deployment: Deployment, workload: Workload, base: Profile, tokenizer: Path, seed: int) -> Reality:
    endpoint = Endpoint(
        url=deployment.url,
        model="pdserve-demo",
        api=Api.COMPLETIONS,
        api_key=None,
        extra={"ignore_eos": True},
        timeout=60,
    )
    client = Client(endpoint, time.perf_counter)
    runner = Runner(
        client, PromptWriter(words_of(tokenizer), Sizing(tokens_per_word=1.0), seed), time.perf_counter, "r"
    )
    running = asyncio.create_task(runner.run(replay(workload.entries), None))
    pids = [os.getpid(), deployment.process.pid, *deployment.children()]
    moments = [Moment.now(pids)]
    try:
        await asyncio.sleep(workload.calibrate_at)
        moments.append(Moment.now(pids))
        learned = await asyncio.to_thread(_engines, deployment)
        profile = calibrated(base, list(learned.values()), await asyncio.to_thread(_records, deployment))
        await asyncio.sleep(workload.entries[workload.begin].at - runner.elapsed - 1)
        moments.append(Moment.now(pids))
        await running
        moments.append(Moment.now(pids))
    finally:
        running.cancel()
        await client.close()
    await asyncio.sleep(HEARTBEAT)
    busy = _busy(learned, await asyncio.to_thread(_engines, deployment), moments[3].at - moments[2].at)
    others = {"calibration": others_cores(*moments[:2]), "measured": others_cores(*moments[2:])}
    records = {_place(record["client_request_id"]): record for record in _records(deployment)}
    results = {_place(result.id): result for result in runner.results}
    return Reality(results, records, profile, busy, others)


def _engines(deployment: Deployment) -> dict[str, dict[str, Any]]:
    answer = httpx.get(f"{deployment.admin_url}/admin/steps", timeout=30)
    return {engine["id"]: engine for engine in answer.json()["engines"]}


def _records(deployment: Deployment) -> list[dict[str, Any]]:
    answer = httpx.get(f"{deployment.admin_url}/admin/requests", params={"latest": 1000}, timeout=30)
    requests: list[dict[str, Any]] = answer.json()["requests"]
    return requests


def _place(request_id: str) -> int:
    return int(request_id.rpartition("-")[2])


def _busy(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], seconds: float) -> dict[str, float]:
    """Share of the time between two looks that each engine spent in steps."""

    def in_steps(engine: dict[str, Any]) -> float:
        return sum(float(tally["seconds"]) for tally in engine["steps"])

    return {name: (in_steps(after[name]) - in_steps(before[name])) / seconds for name in after}


class Followed:
    """Takes the routes another router took, and notes what it would have chosen itself in its own view of them."""

    def __init__(self, rules: RoutingRules, picks: dict[str, Pick]) -> None:
        self._own = KVAware(rules)
        self._picks = picks
        self.would: dict[str, Pick] = {}

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        own = self._own.choose(ask, state)
        self.would[ask.request_id] = Pick(own.prefill.engine_id, own.decode.engine_id, own.mode.value)
        pick = self._picks[ask.request_id]
        views = {view.endpoint.engine_id: view for view in state.engines}
        return Route(
            mode=type(own.mode)(pick.mode),
            prefill=views[pick.prefill].endpoint,
            decode=views[pick.decode].endpoint,
            reason="as the other router",
            uncached_tokens=ask.uncached(views[pick.prefill].key),
        )


def simulate(profile: Profile, workload: Workload, seed: int) -> list[SimulatedRequest]:
    spec = SimulationSpec(profile=profile, engines=ENGINES, seed=seed)
    return list(Simulation(spec).run(from_trace(workload.entries, seed=seed)).requests)


def would_pick(profile: Profile, workload: Workload, picks: dict[int, Pick], seed: int) -> dict[int, Pick]:
    """What the simulator's router would choose at each request, had everything before gone as in reality."""
    followed: list[Followed] = []

    def policy(rules: RoutingRules) -> Followed:
        followed.append(Followed(rules, {f"r{place}": pick for place, pick in picks.items()}))
        return followed[0]

    spec = SimulationSpec(profile=profile, engines=ENGINES, seed=seed, policy=policy)
    Simulation(spec).run(from_trace(workload.entries, seed=seed))
    return {int(name[1:]): pick for name, pick in followed[0].would.items()}


def run(requests: int, rate: float, seed: int) -> dict[str, Any]:
    workload = Workload.of(requests, rate, seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_config(folder / "cluster.yaml", {"device": "cpu", "pools": POOLS})
        config = load_config(path, env={})
        tokenizer = config.model_path / "tokenizer.json"
        with deployed(folder / "log", str(path)) as deployment:
            reality = asyncio.run(serve(deployment, workload, base_profile(config), tokenizer, seed))
    failed = [result.error for result in reality.results.values() if result.outcome is not Outcome.OK]
    assert not failed, failed
    wrong = [p for p, e in enumerate(workload.entries) if reality.results[p].input_tokens != e.input_tokens]
    assert not wrong, f"prompts {wrong} differ in length from the trace"
    simulated = simulate(reality.profile, workload, seed)
    picks = {place: pick_of(record["route"]) for place, record in reality.records.items()}
    would = would_pick(reality.profile, workload, picks, seed)
    places = range(workload.begin, len(workload.entries))
    return {
        **compared(places, reality.results, reality.records, simulated, would),
        "engine_busy": reality.busy,
        "others_cores": reality.others,
        "profile": reality.profile.model_dump(mode="json"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "simulator_accuracy.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    outcome = run(args.requests, args.rate, args.seed)
    report = {
        "benchmark": "simulator_accuracy",
        "model": "demo",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load, 2),
        "requests": args.requests,
        "rate": args.rate,
        "seed": args.seed,
        **outcome,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(render(report))


if __name__ == "__main__":
    main()
