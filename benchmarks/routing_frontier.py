"""Prefix hits against balance: the same trace on the same simulated engines under each routing policy.

    python -m benchmarks.routing_frontier TRACE… --engines 8u --kv-tokens 3000000

Hits are the share of all prompt tokens that were not computed because their KV was cached, or fetched from a peer's
cache; imbalance is most ÷ mean of the prompt tokens engines computed. Answers are cut to a few tokens, so that a run
takes a minute: what is compared are prompts, and TPOT is not told. `bound` is what one unbounded cache would find.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from pdserve.cli.simulate import parse_engines
from pdserve.router.rules import RoutingRules
from pdserve.simulator.profile import load_profile
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.traces import TraceEntry, read_trace

RULES = RoutingRules()
SETTINGS: dict[str, tuple[str, RoutingRules]] = {
    "kv_aware": ("kv_aware", RULES),
    "kv_aware, no fetch": ("kv_aware", replace(RULES, fetch=False)),
    **{
        f"kv_aware, no fetch, evict_weight {weight:g}": (
            "kv_aware",
            replace(RULES, fetch=False, evict_weight=weight),
        )
        for weight in (0.0, 1.0)
    },
    "dynamo": ("dynamo", RULES),
    "llm_d": ("llm_d", RULES),
    "prefix": ("prefix", RULES),
    "round_robin": ("round_robin", RULES),
}


def run(entries: Sequence[TraceEntry], args: argparse.Namespace, policy: str, rules: RoutingRules) -> SimulationReport:
    spec = SimulationSpec(
        profile=load_profile(args.profile),
        engines=parse_engines(args.engines),
        block_size=entries[0].block_tokens,
        kv_tokens=args.kv_tokens,
        policy=policy,
        rules=rules,
    )
    return Simulation(spec).run(from_trace(entries))


def figures(report: SimulationReport) -> dict[str, float]:
    ttft = report.load.ttft
    if ttft is None:
        raise RuntimeError("no request was answered")
    return {
        "prefix_hit_share": round(report.prefix_hit_share, 4),
        "imbalance": round(report.imbalance, 3),
        "ttft_p50": round(ttft.p50, 4),
        "ttft_p99": round(ttft.p99, 3),
        "failed": report.load.failed,
    }


def bound(entries: Sequence[TraceEntry]) -> float:
    """Hit share of one cache without bounds that holds a prompt as soon as it arrives."""
    seen: set[int] = set()
    hits = 0
    for entry in entries:
        depth = next((n for n, block in enumerate(entry.hash_ids) if block not in seen), len(entry.hash_ids))
        hits += min(depth * entry.block_tokens, entry.input_tokens - 1)
        seen.update(entry.hash_ids)
    return hits / sum(entry.input_tokens for entry in entries)


def compare(trace: Path, args: argparse.Namespace) -> dict[str, object]:
    longest = load_profile(args.profile).max_model_len - args.answer
    entries = [
        replace(entry, output_tokens=min(entry.output_tokens, args.answer))
        for entry in read_trace(trace)
        if entry.input_tokens <= longest
    ]
    print(f"{trace.name}: {len(entries)} requests, bound {bound(entries):.1%}")
    found: dict[str, dict[str, float]] = {}
    for name, (policy, rules) in SETTINGS.items():
        if args.only and name not in args.only:
            continue
        found[name] = one = figures(run(entries, args, policy, rules))
        print(
            f"  {name:<36} hits {one['prefix_hit_share']:6.1%}  imbalance {one['imbalance']:5.2f}  "
            f"TTFT p50 {one['ttft_p50'] * 1e3:6.0f} ms  p99 {one['ttft_p99']:7.2f} s",
            flush=True,
        )
    return {"requests": len(entries), "bound": round(bound(entries), 4), "settings": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--engines", default="8u")
    parser.add_argument("--kv-tokens", type=int, default=3_000_000, help="Of each engine.")
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--answer", type=int, default=8, help="Answers are cut to so many tokens.")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="These settings alone.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing_frontier.json")
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    result = {
        "benchmark": "routing_frontier",
        "engines": args.engines,
        "kv_tokens": args.kv_tokens,
        "profile": args.profile,
        "answer_tokens": args.answer,
        "traces": {trace.name: compare(trace, args) for trace in args.traces},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
