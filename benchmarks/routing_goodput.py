"""The highest rate at which simulated engines meet an SLO: mixes of prefill and decode engines on public traces.

    python -m benchmarks.routing_goodput TRACE… --engines 1p1d 2p2d 4p4d 6p2d

A trace's first requests arrive at their own pace, made faster or slower as a whole; paces are those of a geometric
scale with four steps to the double, searched by bisection. The SLO is that of Mooncake (Qin et al., FAST'25, fig. 15),
TTFT within 10 s and TPOT within 100 ms, here for nine requests of ten. The other figures are those of the highest rate.
Results are kept as they come.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from pdserve.cli.simulate import parse_engines
from pdserve.simulator.profile import load_profile
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import Scaling, read_trace

SLO = Slo(ttft=10.0, tpot=0.1, attainment=0.9)
STEPS_TO_DOUBLE = 4
FASTEST = 8 * STEPS_TO_DOUBLE
"""On the scale; step 0 is the trace's own pace. Slower than a 16th of it is not tried."""
SLOWEST = -4 * STEPS_TO_DOUBLE


class Search:
    """Serves one trace on one mix of engines at any pace, each once."""

    def __init__(self, trace: Path, engines: str, args: argparse.Namespace) -> None:
        self._trace = trace
        self._limit: int = args.requests
        self._spec = SimulationSpec(
            profile=load_profile(args.profile), engines=parse_engines(engines), block_size=512, policy=args.policy
        )
        self._reports: dict[int, SimulationReport] = {}

    def at(self, step: int) -> SimulationReport:
        if step not in self._reports:
            entries = read_trace(self._trace, Scaling(speed=2 ** (step / STEPS_TO_DOUBLE), limit=self._limit))
            longest = self._spec.profile.max_model_len
            fitting = [entry for entry in entries if entry.input_tokens + entry.output_tokens <= longest]
            self._reports[step] = Simulation(self._spec).run(from_trace(fitting), slo=SLO)
        return self._reports[step]

    def meets(self, step: int) -> bool:
        verdict = self.at(step).load.verdict
        return bool(verdict and verdict.passed)

    def highest(self) -> int | None:
        """The highest step that meets the SLO, taking it that all lower ones do; None where none does."""
        low, high = 0, 0
        while not self.meets(low):
            if low == SLOWEST:
                return None
            high, low = low, low - STEPS_TO_DOUBLE
        while high == low and high < FASTEST:
            high += 2 * STEPS_TO_DOUBLE
            low = high if self.meets(high) else low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.meets(middle) else (low, middle)
        return low


def figures(search: Search) -> dict[str, float] | None:
    step = search.highest()
    if step is None:
        return None
    load = search.at(step).load
    last = max(result.result.scheduled for result in search.at(step).requests)
    if not (load.ttft and load.tpot and load.verdict):
        raise RuntimeError("no request was answered")
    gaps = load.handoff_gap
    return {
        "rate": round((load.requests - 1) / last, 3),
        "attainment": round(load.verdict.attainment, 3),
        "ttft_p50": round(load.ttft.p50, 3),
        "ttft_p99": round(load.ttft.p99, 3),
        "handoff_gap_p50": round(gaps.p50, 4) if gaps else 0.0,
        "handoff_gap_p99": round(gaps.p99, 4) if gaps else 0.0,
        "tpot_p50": round(load.tpot.p50, 4),
        "tpot_p99": round(load.tpot.p99, 4),
        "prefix_hit_share": round(search.at(step).prefix_hit_share, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--engines", nargs="+", default=["1p1d", "2p2d", "4p4d", "6p2d"])
    parser.add_argument("--requests", type=int, default=300, help="Of each trace.")
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--policy", default="kv_aware")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing_goodput.json")
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    result: dict[str, Any] = {
        "benchmark": "routing_goodput",
        **{name: getattr(args, name) for name in ("profile", "policy", "requests")},
        "slo": {name: value for name, value in asdict(SLO).items() if value is not None},
        "traces": {},
    }
    if args.out.exists() and (before := json.loads(args.out.read_text())) | {"traces": {}} == result:
        result = before
    for trace in args.traces:
        for engines in args.engines:
            found = figures(Search(trace, engines, args))
            print(trace.name, engines, json.dumps(found), flush=True)
            result["traces"].setdefault(trace.name, {})[engines] = found
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
