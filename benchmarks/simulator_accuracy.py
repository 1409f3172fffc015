"""The simulator against reality: the same requests on 2 prefill + 2 decode engines, real ones and simulated ones.

A first deployment serves strangers, from which a profile is calibrated. A second, as fresh as the simulated one,
warms up and serves the measured conversations; from what it shows a second profile is calibrated. Compared are each
request's route, and the distributions of TTFT and TPOT. docs/simulator.md says what the figures mean.
"""

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.accuracy_report import Pick, compared, pick_of, render
from benchmarks.conversation_trace import conversations, shifted, strangers, warm_up
from benchmarks.other_load import Moment, others_cores
from pdserve.cli.calibrate import base_profile
from pdserve.config.load import load_config
from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.endpoint import Role
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.model.checkpoint import model_revision
from pdserve.router.admission import AdmissionRules
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from pdserve.simulator.calibration import calibrated
from pdserve.simulator.profile import Profile
from pdserve.simulator.report import SimulatedRequest
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import Arrival, from_trace
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
STRANGERS = 60
WARM_UP = 4
"""Strangers before the conversations: an engine's first steps are slower than all others, by what no profile tells."""
WARM_UP_GAP = 3.0
"""Seconds from one of them to the next, so that none meets another."""
HEARTBEAT = 1.5
"""Seconds after which engines have told of their last steps."""
RATE = 1.5


@dataclass(frozen=True)
class Reality:
    """What one deployment did: results and records by place in the workload, the profile they suggest, each engine's
    share of the time spent in steps, and how many cores others used."""

    results: dict[int, RequestResult]
    records: dict[int, dict[str, Any]]
    profile: Profile
    busy: dict[str, float]
    others: float


async def serve(deployment: Deployment, entries: Sequence[TraceEntry], base: Profile, prompts: PromptWriter) -> Reality:
    endpoint = Endpoint(
        url=deployment.url,
        model="pdserve-demo",
        api=Api.COMPLETIONS,
        api_key=None,
        extra={"ignore_eos": True},
        timeout=60,
    )
    client = Client(endpoint, time.perf_counter)
    runner = Runner(client, prompts, time.perf_counter, "r")
    pids = [os.getpid(), deployment.process.pid, *deployment.children()]
    begun = Moment.now(pids)
    try:
        await runner.run(replay(entries), None)
    finally:
        await client.close()
    ended = Moment.now(pids)
    await asyncio.sleep(HEARTBEAT)
    engines, records = _engines(deployment), _records(deployment)
    return Reality(
        results={_place(result.id): result for result in runner.results},
        records={_place(record["client_request_id"]): record for record in records},
        profile=calibrated(base, engines, records),
        busy={engine["id"]: _in_steps(engine) / (ended.at - begun.at) for engine in engines},
        others=others_cores(begun, ended),
    )


def _engines(deployment: Deployment) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = httpx.get(f"{deployment.admin_url}/admin/steps", timeout=30).json()["engines"]
    return engines


def _records(deployment: Deployment) -> list[dict[str, Any]]:
    answer = httpx.get(f"{deployment.admin_url}/admin/requests", params={"latest": 1000}, timeout=30)
    requests: list[dict[str, Any]] = answer.json()["requests"]
    return requests


def _place(request_id: str) -> int:
    return int(request_id.rpartition("-")[2])


def _in_steps(engine: dict[str, Any]) -> float:
    return sum(float(tally["seconds"]) for tally in engine["steps"])


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


def with_prompts(arrivals: Iterable[Arrival], texts: Sequence[str], tokenizer: Tokenizer) -> list[Arrival]:
    """The same requests with the tokens of these texts: what a prompt says settles ties."""
    return [
        replace(arrival, request=replace(arrival.request, prompt_token_ids=tuple(tokenizer.encode(text))))
        for arrival, text in zip(arrivals, texts, strict=True)
    ]


def simulate(profile: Profile, arrivals: Sequence[Arrival], seed: int) -> list[SimulatedRequest]:
    spec = SimulationSpec(profile=profile, engines=ENGINES, seed=seed, admission=AdmissionRules())
    return list(Simulation(spec).run(arrivals).requests)


def would_pick(profile: Profile, arrivals: Sequence[Arrival], picks: dict[int, Pick], seed: int) -> dict[int, Pick]:
    """What the simulator's router would choose at each request, had everything before gone as in reality."""
    followed: list[Followed] = []

    def policy(rules: RoutingRules) -> Followed:
        followed.append(Followed(rules, {f"r{place}": pick for place, pick in picks.items()}))
        return followed[0]

    spec = SimulationSpec(profile=profile, engines=ENGINES, seed=seed, policy=policy, admission=AdmissionRules())
    Simulation(spec).run(arrivals)
    return {int(name[1:]): pick for name, pick in followed[0].would.items()}


def run(requests: int, rate: float, seed: int) -> dict[str, Any]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_config(folder / "cluster.yaml", {"device": "cpu", "pools": POOLS})
        config = load_config(path, env={})
        prompts = PromptWriter(words_of(config.model_path / "tokenizer.json"), Sizing(tokens_per_word=1.0), seed)

        def real(entries: Sequence[TraceEntry]) -> Reality:
            with deployed(folder / "log", str(path)) as deployment:
                return asyncio.run(serve(deployment, entries, base_profile(config), prompts))

        entries = warm_up(WARM_UP, WARM_UP_GAP, seed)
        entries += shifted(conversations(requests, rate, seed), WARM_UP * WARM_UP_GAP)
        before, measured = real(strangers(STRANGERS, rate, seed)), real(entries)
    failed = [result.error for result in measured.results.values() if result.outcome is not Outcome.OK]
    assert not failed, failed
    wrong = [p for p, e in enumerate(entries) if measured.results[p].input_tokens != e.input_tokens]
    assert not wrong, f"prompts {wrong} differ in length from the trace"
    texts = [prompts.write(planned) for planned in replay(entries)]
    arrivals = with_prompts(from_trace(entries, seed=seed), texts, Tokenizer.load(config.model_path))
    picks = {place: pick_of(record["route"]) for place, record in measured.records.items()}

    def against(profile: Profile) -> dict[str, Any]:
        # Block hashes name the model by its revision, which in the simulator is the profile's name.
        profile = profile.model_copy(update={"name": model_revision(config.model_path)})
        simulated = simulate(profile, arrivals, seed)
        would = would_pick(profile, arrivals, picks, seed)
        outcome = compared(range(WARM_UP, len(entries)), measured.results, measured.records, simulated, would)
        return {**outcome, "profile": profile.model_dump(mode="json")}

    return {
        "engine_busy": measured.busy,
        "others_cores": {"before": before.others, "measured": measured.others},
        "calibrated": {"before": against(before.profile), "from_the_run": against(measured.profile)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=RATE)
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
    for when, compared_to in report["calibrated"].items():
        print(f"calibrated {when}:\n{render(compared_to)}")


if __name__ == "__main__":
    main()
