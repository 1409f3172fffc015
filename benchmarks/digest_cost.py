"""What digests cost a request, as a part of its unloaded time to first token, by prompt length.

One prefill and one decode engine with the demo model, one request at a time, prompts nobody has seen. The target's
time for verifying is in each request's record. The source digests as many bytes, which may have left the caches by
then: they are counted at the rate of xxh3 from memory, measured here first. All of it counts, although a chunk's digest
runs beside the next chunk's computing, and neither delays the first token itself: that comes from the prefill engine.
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
import numpy as np

from benchmarks.quiet import QUIET, usage
from pdserve.transfer.host_spans import digest_spans
from tests.deployment import Deployment, deployed, write_config

PROMPT_TOKENS = (64, 256, 512, 1024, 2000)
VOCABULARY = 4000
WARM_UP = 3


def seconds_per_byte() -> float:
    """xxh3 over bytes that are in no cache: the median of several passes over more than any cache holds."""
    memory = np.ones(256 << 20, dtype=np.uint8)
    lengths = np.full(1024, memory.nbytes // 1024, dtype=np.uint64)
    offsets = lengths.cumsum() - lengths
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        digest_spans(memory, offsets, lengths, [1])
        taken.append((time.perf_counter() - begun) / memory.nbytes)
    return statistics.median(taken)


def measure(deployment: Deployment, prompt: list[int]) -> dict[str, float]:
    """Seconds to the first token and for verifying, and the bytes verified."""
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    first, record = None, None
    start = time.perf_counter()
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                record = json.loads(line.removeprefix("data: ")).get("pdserve") or record
    assert first is not None
    assert record is not None
    transfer = record["transfer"]
    return {"ttft": first, "verify": transfer["stage_seconds"]["verify"], "bytes": transfer["bytes"]}


def run(repetitions: int, rng: random.Random) -> list[dict[str, Any]]:
    samples: dict[int, list[dict[str, float]]] = {length: [] for length in PROMPT_TOKENS}
    per_byte = seconds_per_byte()
    with TemporaryDirectory() as folder:
        config = write_config(Path(folder) / "config.yaml", {"routing": {"decode_local_below": 0}})
        with deployed(Path(folder) / "serve.log", str(config)) as deployment:
            for repetition in range(repetitions + WARM_UP):
                for length in rng.sample(PROMPT_TOKENS, len(PROMPT_TOKENS)):
                    pids = deployment.children()
                    before = usage(pids)
                    sample = measure(deployment, [rng.randrange(VOCABULARY) for _ in range(length)])
                    sample["digests"] = sample["verify"] + sample["bytes"] * per_byte
                    sample["others"] = usage(pids).others_since(before)
                    if repetition >= WARM_UP:
                        samples[length].append(sample)
    return [_row(length, rows) for length, rows in samples.items()]


def _row(length: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    shares = [sample["digests"] / sample["ttft"] for sample in samples]
    return {
        "prompt_tokens": length,
        "kib": round(samples[0]["bytes"] / 1024),
        "ttft_ms": round(statistics.median(sample["ttft"] for sample in samples) * 1e3, 2),
        "digests_ms": round(statistics.median(sample["digests"] for sample in samples) * 1e3, 3),
        "share_of_ttft": round(statistics.median(shares), 4),
        "quiet_samples": sum(sample["others"] < QUIET for sample in samples),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/kv-transfer.md."""
    lines = ["| prompt | KV | TTFT | digests, both sides | share |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (
            f"{row['prompt_tokens']} tokens | {row['kib']} KiB | {row['ttft_ms']:.1f} ms | {row['digests_ms']:.2f} ms"
        )
        lines.append(f"| {cells} | {row['share_of_ttft']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digest_cost.json")
    args = parser.parse_args()
    load = os.getloadavg()
    rows = run(args.repetitions, random.Random(args.seed))
    report = {
        "benchmark": "digest_cost",
        "model": "demo",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load[0], 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "repetitions": args.repetitions,
        "seed": args.seed,
        "results": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
