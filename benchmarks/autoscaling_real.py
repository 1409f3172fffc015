"""The comparison of benchmarks.autoscaling with real processes: `python -m benchmarks.autoscaling_real`.

`pdserve serve --launcher process` with the demo model on CPU, one thread per engine, and a load whose rate triples and
falls back. static keeps the most engines there may be; ours follows the policy; hpa is a policy reduced to what a plain
rule knows: no forecast, queue and KV alone, a decision every 15 s, 10 % of tolerance, and five minutes before it
shrinks. Engine-seconds are counted by asking who is there twice a second. All engines of a machine share its
processors, so more of them than processors serve no more.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.deployment import Deployment, deployed, write_config

TTFT, TPOT = 2.0, 0.2
MOST = {"prefill": 2, "decode": 2}
SHAPE = ((40.0, 1.0, 1.0), (10.0, 1.0, 3.0), (40.0, 3.0, 3.0), (10.0, 3.0, 1.0), (60.0, 1.0, 1.0))
"""(seconds, rate at the beginning, rate at the end), in multiples of the base rate."""
SLO = {"ttft": {"seconds": TTFT}, "tpot": {"seconds": TPOT}}
POLICIES: dict[str, dict[str, Any]] = {
    "ours": {
        "interval": 2.0,
        "window": 10.0,
        "pools": {"warm_up": 5.0, "down": {"cooldown": 5.0, "window": 15.0}, "forecast": {"bin": 5.0}},
        "flip": {"enabled": True, "cooldown": 5.0, "spare_for": 5.0},
    },
    "hpa": {
        "interval": 15.0,
        "window": 15.0,
        "pools": {
            "targets": {"slo": None, "backlog_seconds": None, "kv_occupancy": 0.7, "queue": 1.0},
            "reactive": {"dead_band": [0.9, 1.1]},
            "down": {"cooldown": 0.0, "window": 300.0},
            "forecast": {"kind": "none"},
        },
        "bypass": {"enabled": False},
    },
}


def write_trace(path: Path, base: float, seed: int) -> Path:
    """Poisson arrivals at the rates of SHAPE."""
    rng, at = Random(seed), 0.0
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("timestamp_s", "input_length", "output_length"))
        for seconds, first, last in SHAPE:
            begun = at
            while at < begun + seconds:
                at += rng.expovariate(base * (first + (last - first) * (at - begun) / seconds))
                rows.writerow((f"{at:.3f}", rng.randint(200, 900), rng.randint(20, 80)))
    return path


class Meter:
    """Counts engine-seconds while it is open."""

    def __init__(self, deployment: Deployment) -> None:
        self.seconds = dict.fromkeys(MOST, 0.0)
        self._deployment = deployment
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.5):
            now, before = time.monotonic(), last
            last = now
            for engine in self._deployment.engines().values():
                if engine["state"] != "dead":
                    self.seconds[engine["role"]] += now - before


def serve(rule: str, folder: Path, base: float, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": "cpu", "slo": {"ttft": TTFT, "tpot": TPOT}}
    if rule == "static":
        settings["pools"] = {role: {"engines": count} for role, count in MOST.items()}
    else:
        policy = dict(POLICIES[rule])
        pools = {role: {"min": 1, "max": count, **policy["pools"]} for role, count in MOST.items()}
        settings["policies"] = str(write_config(folder / f"{rule}.yaml", {**policy, "slo": SLO, "pools": pools}))
    config = write_config(folder / f"{rule}-cluster.yaml", settings)
    trace, report = write_trace(folder / "trace.csv", base, seed), folder / f"{rule}.json"
    with deployed(folder / f"{rule}.log", str(config)) as deployment:
        busy_before = os.getloadavg()[0]
        with Meter(deployment) as meter:
            command = [sys.executable, "-c", "from pdserve.cli import main; main()", "loadgen", "run"]
            options = ["--url", deployment.url, "--trace", str(trace), "--json", str(report)]
            slo = ["--slo", f"ttft={TTFT},tpot={TPOT}"]
            subprocess.run([*command, *options, *slo], check=False, stdout=subprocess.DEVNULL)
        scaling = httpx.get(f"{deployment.admin_url}/admin/scaling", timeout=10)
        decisions = scaling.json()["decisions"] if scaling.status_code == 200 else []
    body = json.loads(report.read_text())
    return {
        "requests": body["requests"],
        "failed": body["failed"],
        "attainment": round(body["verdict"]["attainment"], 4),
        "engine_seconds": {role: round(seconds) for role, seconds in meter.seconds.items()},
        "engine_seconds_total": round(sum(meter.seconds.values())),
        "ttft_p95": round(body["ttft"]["p95"], 3),
        "tpot_p95": round(body["tpot"]["p95"], 4),
        "decisions": [f"{each['what']} [{each['rule']}]" for each in decisions],
        "load_average_before": busy_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=("static", "hpa", "ours"), action="append", help="default: all")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second before the load triples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoscaling_real.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "autoscaling_real", "slo": {"ttft": TTFT, "tpot": TPOT}, "shape": SHAPE}
    result |= {"most": MOST, "base_rate": arguments.rate, "seed": arguments.seed}
    with TemporaryDirectory() as folder:
        for rule in arguments.rule or ("static", "hpa", "ours"):
            result[rule] = serve(rule, Path(folder), arguments.rate, arguments.seed)
            print(rule, json.dumps(result[rule]), flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
