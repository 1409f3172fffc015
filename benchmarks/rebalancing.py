"""What moves that even out load change, in the simulator: `python -m benchmarks.rebalancing`.

Each deployment of two prefill and two decode engines serves the same requests with and without `routing.rebalance`,
a few times with other requests. In `returning` one decode engine dies at the start and is back while the other has all
requests; in `even` the router spreads them. Figures are ratios, with over without."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import mean

import structlog

from pdserve.core.endpoint import Role
from pdserve.router.rules import RoutingRules
from pdserve.simulator.cluster import Fault
from pdserve.simulator.profile import PRESETS
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.traces import TraceEntry

SEEDS = range(5)
PROFILE = "demo-cpu"
CASES = {
    "returning": (24, 12.0, (500, 1000), (Fault(at=0.05, engine_id="decode-1", lasts=1.5),)),
    "even": (60, 7.0, (50, 400), ()),
}
"""Requests, their rate per second, shortest and longest answer, faults."""


def trace(seed: int, count: int, rate: float, outputs: tuple[int, int]) -> Iterator[TraceEntry]:
    """Poisson arrivals of prompts that share nothing."""
    rng, at = Random(seed), 0.0
    for number in range(count):
        at += rng.expovariate(rate)
        yield TraceEntry(
            at=at,
            input_tokens=rng.randint(40, 400),
            output_tokens=rng.randint(*outputs),
            hash_ids=(number,),
            block_tokens=4096,
        )


def serve(case: str, seed: int, *, rebalance: bool) -> SimulationReport:
    count, rate, outputs, faults = CASES[case]
    spec = SimulationSpec(
        profile=PRESETS[PROFILE],
        engines={Role.PREFILL: 2, Role.DECODE: 2},
        rules=RoutingRules(rebalance=rebalance),
        seed=seed,
    )
    return Simulation(spec).run(from_trace(trace(seed, count, rate, outputs), seed=seed), faults=faults)


def figures(report: SimulationReport) -> dict[str, float]:
    load = report.load
    if not (load.tpot and load.itl and load.e2e):
        raise RuntimeError("no request was answered")
    return {"e2e_mean": load.e2e.mean, "tpot_mean": load.tpot.mean, "tpot_p99": load.tpot.p99, "itl_p99": load.itl.p99}


def compare(case: str) -> dict[str, object]:
    ratios: list[dict[str, float]] = []
    moves = []
    for seed in SEEDS:
        without, with_moves = (serve(case, seed, rebalance=rebalance) for rebalance in (False, True))
        answers = [{each.result.id: each.token_ids for each in report.requests} for report in (without, with_moves)]
        if answers[0] != answers[1] or with_moves.load.failed:
            raise RuntimeError(f"{case}, seed {seed}: answers differ")
        before, after = figures(without), figures(with_moves)
        ratios.append({name: after[name] / before[name] for name in before})
        moves.append(sum(len(each.record.migrations) for each in with_moves.requests))
    spread = {
        name: {"mean": mean(each[name] for each in ratios), "max": max(each[name] for each in ratios)}
        for name in ratios[0]
    }
    return {"moves": moves, "ratios": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rebalancing.json")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    result = {"benchmark": "rebalancing", "profile": PROFILE, "cases": {case: compare(case) for case in CASES}}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
