"""The highest rate at which simulated engines meet an SLO under each routing policy: mixes of prefill and decode
engines on public traces.

    python -m benchmarks.routing_goodput TRACE… --engines 1p1d 2p2d 4p4d 6p2d

The first requests of a trace, --warm-up for each engine, fill caches and the queues of prompts: their answers are cut
to two tokens, and they are not judged. The --requests that follow are. All arrive at the trace's own pace, made faster
or slower as a whole by a geometric scale with eight steps to the double; the highest step that meets the SLO is
searched by bisection, taking it that all lower ones meet it. Goodput is interpolated between that step and the next, to
where their attainments reach the SLO's; the other figures are those of the step that meets it. The SLO is that of
Mooncake (Qin et al., FAST'25, fig. 15), TTFT within 10 s and TPOT within 100 ms, here for nine requests of ten.
Results are kept as they come; what is in --out already, under the same settings, is not measured again.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog

from pdserve.cli.simulate import parse_engines
from pdserve.router.policies import BUILT_IN
from pdserve.simulator.profile import load_profile
from pdserve.simulator.report import SimulatedRequest, hit_share
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.report import Report, build_report
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import Scaling, TraceEntry, read_trace, scale

SLO = Slo(ttft=10.0, tpot=0.1, attainment=0.9)
STEPS_TO_DOUBLE = 8
SLOWEST, FASTEST = -4 * STEPS_TO_DOUBLE, 8 * STEPS_TO_DOUBLE
"""On the scale; step 0 is the trace's own pace."""
POLICIES = ["kv_aware", "dynamo", "llm_d", "round_robin", "prefix"]
WARM_UP_ANSWER = 2
"""Tokens; with a second one the prompt's KV has gone to a decode engine, as that of every request does."""


class Search:
    """Serves one trace on one mix of engines under one policy at any pace, each once."""

    def __init__(self, trace: Path, engines: str, policy: str, args: argparse.Namespace) -> None:
        self._profile = load_profile(args.profile)
        counts = parse_engines(engines)
        wanted: int = args.warm_up * sum(counts.values())
        self._entries = self._fitting(read_trace(trace))[: wanted + args.requests]
        self._warm_up: int = min(wanted, len(self._entries) - args.requests)
        if self._warm_up < 0:
            raise SystemExit(f"{trace} has {len(self._entries)} requests: judge no more than that (--requests)")
        self._spec = SimulationSpec(profile=self._profile, engines=counts, block_size=512, policy=policy)
        self._served: dict[int, tuple[Report, float]] = {}

    def _fitting(self, entries: list[TraceEntry]) -> list[TraceEntry]:
        longest = self._profile.max_model_len
        return [entry for entry in entries if entry.input_tokens + entry.output_tokens <= longest]

    def rate(self, step: int) -> float:
        """Requests per second among those that are judged."""
        judged = self._entries[self._warm_up :]
        return (len(judged) - 1) / (judged[-1].at - judged[0].at) * 2 ** (step / STEPS_TO_DOUBLE)

    def at(self, step: int) -> tuple[Report, float]:
        """The judged requests' report and their hit share."""
        if step not in self._served:
            speed = Scaling(speed=2 ** (step / STEPS_TO_DOUBLE))
            entries = [*scale(self._entries, speed)]
            warming = [replace(entry, output_tokens=WARM_UP_ANSWER) for entry in entries[: self._warm_up]]
            done = Simulation(self._spec).run(from_trace([*warming, *entries[self._warm_up :]]))
            self._served[step] = _judged(done.requests[self._warm_up :])
        return self._served[step]

    def attained(self, step: int) -> float:
        verdict = self.at(step)[0].verdict
        assert verdict
        return verdict.attainment

    def meets(self, step: int) -> bool:
        return self.attained(step) >= SLO.attainment

    def highest(self, start: int) -> int | None:
        """The highest step that meets the SLO; None where none does. start: where to look first."""
        low, high, width = start, start, 1
        while not self.meets(low):
            if low == SLOWEST:
                return None
            high, low, width = low, max(SLOWEST, low - width), 2 * width
        while high == low and high < FASTEST:
            high, width = min(FASTEST, high + width), 2 * width
            low = high if self.meets(high) else low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.meets(middle) else (low, middle)
        return low

    def goodput(self, step: int) -> float:
        """Rate at which just as many requests as the SLO asks meet it, if step is the highest that meets it."""
        here = self.attained(step)
        spare, lost = here - SLO.attainment, here - self.attained(min(FASTEST, step + 1))
        share = spare / lost if lost > 0 else 0.0
        return self.rate(step) + share * (self.rate(step + 1) - self.rate(step))

    @property
    def attainments(self) -> dict[str, float]:
        """Rate → share of requests within the SLO, of all paces that were tried."""
        return {f"{self.rate(step):.3f}": round(self.attained(step), 4) for step in sorted(self._served)}


def _judged(requests: tuple[SimulatedRequest, ...]) -> tuple[Report, float]:
    return build_report([request.result for request in requests], title="judged", slo=SLO), hit_share(requests)


def figures(search: Search, start: int) -> dict[str, Any] | None:
    step = search.highest(start)
    if step is None:
        return None
    report, hits = search.at(step)
    if not (report.ttft and report.tpot):
        raise RuntimeError("no request was answered")
    gaps = report.handoff_gap
    return {
        "goodput": round(search.goodput(step), 3),
        "step": step,
        "rate": round(search.rate(step), 3),
        "ttft_p50": round(report.ttft.p50, 3),
        "ttft_p99": round(report.ttft.p99, 3),
        "handoff_gap_p50": round(gaps.p50, 4) if gaps else 0.0,
        "handoff_gap_p99": round(gaps.p99, 4) if gaps else 0.0,
        "tpot_p50": round(report.tpot.p50, 4),
        "tpot_p99": round(report.tpot.p99, 4),
        "prefix_hit_share": round(hits, 3),
        "attainments": search.attainments,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--engines", nargs="+", default=["1p1d", "2p2d", "4p4d", "6p2d"])
    parser.add_argument("--policies", nargs="+", choices=BUILT_IN, default=POLICIES)
    parser.add_argument("--warm-up", type=int, default=75, help="Requests per engine; fewer where a trace ends.")
    parser.add_argument("--requests", type=int, default=200, help="That are judged.")
    parser.add_argument("--start", type=int, default=0, help="Step at which the first search begins; saves time alone.")
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing_goodput.json")
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    result: dict[str, Any] = {
        "benchmark": "routing_goodput",
        **{name: getattr(args, name) for name in ("profile", "warm_up", "requests")},
        "slo": {name: value for name, value in asdict(SLO).items() if value is not None},
        "traces": {},
    }
    if args.out.exists() and (before := json.loads(args.out.read_text())) | {"traces": {}} == result:
        result = before
    for trace in args.traces:
        for engines in args.engines:
            found: dict[str, Any] = result["traces"].setdefault(trace.name, {}).setdefault(engines, {})
            for policy in args.policies:
                if policy in found:
                    continue
                start = next((row["step"] for row in found.values() if row), args.start)
                found[policy] = figures(Search(trace, engines, policy, args), start)
                print(trace.name, engines, policy, json.dumps(found[policy]), flush=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
