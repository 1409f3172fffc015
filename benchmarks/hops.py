"""From client to first token, hop by hop: one request at a time against an idle deployment of the demo model.

The client's own two hops are measured here, all others come from the request's record as `pdserve explain` shows it.
Every process is on this machine, so the stamps are of one clock. Medians with quartiles; what hops cost does not
depend on the model, except prefill. docs/request-lifecycle.md explains each hop.
"""

import argparse
import http.client
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

from tests.deployment import Deployment, deployed

PROMPT_WORDS = 128
OUTPUT_TOKENS = 4
WARM_UP = 8
WORDS = ("the", "nation", "other", "road", "here", "there", "ruin", "file", "line", "word", "python", "count", "open")
FIRST, LAST = "client → gateway", "gateway → client"


def measure(deployment: Deployment, connection: http.client.HTTPConnection, prompt: str) -> dict[str, float]:
    """Seconds by hop, in order, of one streamed completion."""
    body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    encoded = json.dumps(body)
    sent = time.time()
    connection.request("POST", "/v1/completions", encoded, {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, record = None, None
    while line := response.readline():
        if line.startswith(b"data: {"):
            first = first or time.time()
            record = json.loads(line.removeprefix(b"data: ")).get("pdserve") or record
    assert first is not None
    assert record is not None
    return _hops(deployment, record, sent, first)


def until_both_pools_serve(deployment: Deployment) -> None:
    """While one pool is missing, the other one serves alone."""

    def handed_over() -> bool:
        record = deployment.complete(" ".join(random.sample(WORDS, len(WORDS)) * 8)).json()["pdserve"]
        return bool(record["mode"] == "disaggregated")

    deployment.eventually(handed_over)


def _hops(deployment: Deployment, record: dict[str, Any], sent: float, first: float) -> dict[str, float]:
    told = httpx.get(f"{deployment.admin_url}/admin/requests/{record['request_id']}", timeout=10).json()
    assert told["route"]["mode"] == "disaggregated", told["route"]
    arrived = record["stamps"]["arrived"]
    hops = {FIRST: arrived - sent}
    for span in told["timeline"]:
        if span["part"] == "prompt":
            hops[f"{span['name']} ({span['where']})"] = span["seconds"]
    return {**hops, LAST: first - record["stamps"]["first_sent"], "in all": first - sent}


def run(repetitions: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with TemporaryDirectory() as folder, deployed(Path(folder) / "log", "--launcher", "process") as deployment:
        until_both_pools_serve(deployment)
        connection = http.client.HTTPConnection(deployment.address, timeout=60)
        samples = []
        for repetition in range(WARM_UP + repetitions):
            prompt = " ".join(rng.choice(WORDS) for _ in range(PROMPT_WORDS))
            measured = measure(deployment, connection, prompt)
            if repetition >= WARM_UP:
                samples.append(measured)
            time.sleep(0.05)  # idle again
        connection.close()
    return {hop: _summary([sample[hop] * 1e3 for sample in samples]) for hop in samples[0]}


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 3), "q1": round(low, 3), "q3": round(high, 3), "min": round(min(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hops.json")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    hops = run(args.repetitions, args.seed)
    report = {
        "benchmark": "hops",
        "model": "demo",
        "device": "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load, 2),
        "repetitions": args.repetitions,
        "seed": args.seed,
        "prompt_words": PROMPT_WORDS,
        "milliseconds": hops,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'hop':<40} {'median ms':>10} {'q1':>8} {'q3':>8} {'min':>8}")
    for hop, row in hops.items():
        print(f"{hop:<40} {row['median']:10.2f} {row['q1']:8.2f} {row['q3']:8.2f} {row['min']:8.2f}")


if __name__ == "__main__":
    main()
