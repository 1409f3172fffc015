"""What a handoff costs: 1 prefill + 1 decode engine against 1 unified engine, same model, same machine.

Requests alternate between the two deployments. Per prompt length: time to first token, the gap between first and
second token, and the time between later tokens; medians with quartiles, and the ratios of medians. Machines are
shared and noisy: read the ratios.
"""

import argparse
import json
import platform
import random
import statistics
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.deployment import Deployment, deployed, write_config

PROMPT_TOKENS = (64, 256, 1024)
OUTPUT_TOKENS = 24
VOCABULARY = 4000


def measure(deployment: Deployment, prompt: list[int]) -> dict[str, float]:
    """Seconds to an answer's first token, from there to the second, and between later ones (median)."""
    body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    arrivals = []
    start = time.perf_counter()
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line.removeprefix("data: "))["choices"][0]["text"]:
                arrivals.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return {"ttft": arrivals[0] - start, "second_token_gap": gaps[0], "itl": statistics.median(gaps[1:])}


def summary(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4)
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2]}


def run(repetitions: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        unified = {"pools": {"prefill": {"engines": 0}, "decode": {"engines": 0}, "unified": {"engines": 1}}}
        deployments = {
            name: stack.enter_context(
                deployed(folder / f"{name}.log", str(write_config(folder / f"{name}.yaml", settings)))
            )
            for name, settings in (("disaggregated", {}), ("unified", unified))
        }
        for length in PROMPT_TOKENS:
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in deployments}
            for repetition in range(repetitions + 2):
                # A prompt nobody has seen, the same for both.
                prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
                for name, deployment in deployments.items():
                    measured = measure(deployment, prompt)
                    if repetition >= 2:
                        samples[name].append(measured)
            results[str(length)] = _compare(samples)
    return results


def _compare(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    seconds = {
        name: {metric: summary([sample[metric] for sample in rows]) for metric in rows[0]}
        for name, rows in samples.items()
    }
    ratios = {
        metric: seconds["disaggregated"][metric]["median"] / seconds["unified"][metric]["median"]
        for metric in seconds["unified"]
    }
    return {"seconds": seconds, "disaggregated_over_unified": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "handoff.json")
    args = parser.parse_args()
    results = run(args.repetitions, args.seed)
    report = {
        "benchmark": "handoff",
        "model": "demo",
        "device": "cpu",
        "machine": platform.machine(),
        "repetitions": args.repetitions,
        "seed": args.seed,
        "output_tokens": OUTPUT_TOKENS,
        "by_prompt_tokens": results,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{'prompt':>7} {'metric':>17} {'unified ms':>11} {'P+D ms':>9} {'ratio':>6}")
    for length, row in results.items():
        for metric, ratio in row["disaggregated_over_unified"].items():
            unified, split = (row["seconds"][name][metric]["median"] * 1e3 for name in ("unified", "disaggregated"))
            print(f"{length:>7} {metric:>17} {unified:11.1f} {split:9.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
