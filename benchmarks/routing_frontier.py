"""Prefix hits against balance: the same trace on the same simulated engines under each routing policy.

    python -m benchmarks.routing_frontier TRACE… --engines 8u --kv-tokens 3000000

Hits are the share of all prompt tokens that were not computed because their KV was cached, or fetched from a peer's
cache; imbalance is most ÷ mean of the prompt tokens engines computed. Answers are cut to a few tokens, so that a run
takes a minute: what is compared are prompts, and TPOT is not told. `bound` is what one unbounded cache would find.
Results are kept as they come, so that a long comparison may be made in parts.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def compare(trace: Path, args: argparse.Namespace, save: Callable[[str, str, dict[str, float]], None]) -> None:
    longest = load_profile(args.profile).max_model_len - args.answer
    entries = [
        replace(entry, output_tokens=min(entry.output_tokens, args.answer))
        for entry in read_trace(trace)
        if entry.input_tokens <= longest
    ]
    save(trace.name, "bound", {"prefix_hit_share": round(bound(entries), 4), "requests": len(entries)})
    for name, (policy, rules) in SETTINGS.items():
        if not args.only or name in args.only:
            save(trace.name, name, figures(run(entries, args, policy, rules)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--engines", default="8u")
    parser.add_argument("--kv-tokens", type=int, default=3_000_000, help="Of each engine.")
    parser.add_argument("--profile", default="h200-8b")
    parser.add_argument("--answer", type=int, default=8, help="Answers are cut to so many tokens.")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="These alone; others in --out are kept.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing_frontier.json")
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    told = {name: getattr(args, name) for name in ("engines", "kv_tokens", "profile", "answer")}
    result: dict[str, Any] = {"benchmark": "routing_frontier", **told, "traces": {}}
    if args.out.exists() and (before := json.loads(args.out.read_text())) | {"traces": {}} == result:
        result = before

    def save(trace: str, name: str, found: dict[str, float]) -> None:
        print(trace, name, json.dumps(found), flush=True)
        result["traces"].setdefault(trace, {})[name] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for trace in args.traces:
        compare(trace, args, save)


if __name__ == "__main__":
    main()
