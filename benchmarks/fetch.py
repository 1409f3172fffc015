"""What fetching a conversation's history is worth: time to the first token of second turns, fetched against computed.

Real processes, the demo model. The first turn is computed by one prefill engine and handed to a decode engine. The
second turn, the history and a question, goes to another prefill engine that has never seen it; it pulls the history's
KV from the decode engine, or computes it. Both in turn, conversations of their own, by prompt length; medians with
quartiles, and the ratios of pairs. Machines are shared and noisy: read the ratios.

    python -m benchmarks.fetch --out benchmarks/results/fetch.json
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from pdserve.core.cluster import ClusterState, Mode, Route, RouteAsk
from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable
from pdserve.router.fetching import best_fetch, find_sources
from pdserve.router.options import ready_engines
from pdserve.router.rules import RoutingRules
from tests.deployment import Deployment, deployed, write_config

HISTORIES = (128, 256, 512, 1024, 1888)
QUESTION = 32
VOCABULARY = 4000
FETCHED, COMPUTED = 2, 3
"""max_tokens of a second turn, by which the policy knows what is wanted."""


class SecondTurns:
    """First turns on prefill-0, second ones on prefill-1, with the history from the decode engine where wanted."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        prefills, decodes = (ready_engines(ask, state, role) for role in (Role.PREFILL, Role.DECODE))
        if len(prefills) < 2 or not decodes:
            raise Unavailable("the engines are not all there")
        view = prefills[bool(ask.hits)]
        plan = None
        if ask.max_tokens == FETCHED:
            sources = [v for v in find_sources(ask, state, self._rules) if v.endpoint.role is Role.DECODE]
            plan = best_fetch(ask, view, sources, self._rules)
        return Route(
            mode=Mode.DISAGGREGATED, prefill=view.endpoint, decode=decodes[0].endpoint, reason="as measured", fetch=plan
        )


SETTINGS = {
    "pools": {"prefill": {"engines": 2}, "decode": {"engines": 1}},
    "routing": {"policy": "benchmarks.fetch:SecondTurns"},
}


def ask(deployment: Deployment, prompt: list[int], max_tokens: int) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token, and the request's record."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    first = 0.0
    record: dict[str, Any] = {}
    start = time.perf_counter()
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                record = json.loads(line.removeprefix("data: ")).get("pdserve") or record
    return first, record


def second_turn(deployment: Deployment, rng: random.Random, history: int, how: int) -> dict[str, float]:
    prompt = [rng.randrange(3, VOCABULARY) for _ in range(history)]
    ask(deployment, prompt, 1 + COMPUTED)
    time.sleep(0.05)  # the decode engine's news of its cache come with the next heartbeat at the latest
    question = [rng.randrange(3, VOCABULARY) for _ in range(QUESTION)]
    ttft, record = ask(deployment, prompt + question, how)
    assert record["prefill"]["engine"] == "prefill-1"
    fetch = record["fetch"]
    assert bool(fetch) == (how == FETCHED), record
    if not fetch:
        return {"ttft": ttft}
    assert fetch["tokens"] == history, fetch
    return {"ttft": ttft, "fetch": fetch["seconds"], "predicted": fetch["predicted_seconds"]}


def run(repetitions: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    results = {}
    with TemporaryDirectory() as folder:
        config = write_config(Path(folder) / "cluster.yaml", SETTINGS)
        with deployed(Path(folder) / "serve.log", str(config)) as deployment:
            for history in HISTORIES:
                samples: dict[int, list[dict[str, float]]] = {FETCHED: [], COMPUTED: []}
                for repetition in range(repetitions + 1):
                    for how in random.Random(repetition).sample((FETCHED, COMPUTED), 2):
                        measured = second_turn(deployment, rng, history, how)
                        if repetition:
                            samples[how].append(measured)
                results[str(history + QUESTION)] = _summary(samples[FETCHED], samples[COMPUTED])
    return results


def _summary(fetched: list[dict[str, float]], computed: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [f["ttft"] / c["ttft"] for f, c in zip(fetched, computed, strict=True)]
    return {
        "ttft_fetched": quartiles([sample["ttft"] for sample in fetched]),
        "ttft_computed": quartiles([sample["ttft"] for sample in computed]),
        "fetch": quartiles([sample["fetch"] for sample in fetched]),
        "fetch_predicted": quartiles([sample["predicted"] for sample in fetched]),
        "fetched_over_computed": quartiles(ratios),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4)
    return {"median": median, "q1": q1, "q3": q3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    results = run(args.repetitions, args.seed)
    report = {
        "benchmark": "fetch",
        "model": "demo",
        "device": "cpu",
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load_before": load_before},
        "repetitions": args.repetitions,
        "question_tokens": QUESTION,
        "by_prompt_tokens": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'prompt':>7} {'fetched ms':>11} {'computed ms':>12} {'ratio':>6} {'quartiles':>12} {'fetch ms':>9}")
    for length, row in results.items():
        ratio = row["fetched_over_computed"]
        print(
            f"{length:>7} {row['ttft_fetched']['median'] * 1e3:11.1f} {row['ttft_computed']['median'] * 1e3:12.1f} "
            f"{ratio['median']:6.2f} {ratio['q1']:5.2f}–{ratio['q3']:.2f} {row['fetch']['median'] * 1e3:9.1f}"
        )


if __name__ == "__main__":
    main()
