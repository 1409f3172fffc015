"""The comparison of benchmarks.autoscaling with real processes: `python -m benchmarks.autoscaling_real`.

`pdserve serve --launcher process` with the demo model on CPU, and a load whose rate triples and falls back. The rules
are those of the simulated comparison: static keeps the most engines there may be, hpa is Kubernetes' plain rule, ours
follows the policy below. Engine-seconds are counted by asking who is there twice a second, until the last request was
answered.

All engines of a machine share its processors, so more of them than processors would serve no more. Here each computes
and moves everything as ever and then sleeps until its step has taken as long as STEP says (benchmarks.paced_engine),
which is several times what it computes: so engines add up, as long as the machine keeps up with them. Where it does
not, steps take longer than STEP says, and all rules suffer.

`--flips N` measures instead how long an engine takes from the decision that it shall have the other role until it has
it, and whether answers that are being written then come out whole and the same.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from benchmarks.autoscaling import RULES
from benchmarks.paced_engine import ENVIRONMENT
from pdserve.simulator.profile import StepCost
from tests.deployment import FREE_PORTS, Deployment, deployed, write_config

TTFT, TPOT = 6.0, 0.15
STEP = StepCost(base=0.02, per_token=4e-3, per_context=0.0)
MOST = {"prefill": 4, "decode": 2}
SHAPE = ((60.0, 1.0, 1.0), (30.0, 1.0, 3.0), (60.0, 3.0, 3.0), (30.0, 3.0, 1.0), (60.0, 1.0, 1.0))
"""(seconds, rate at the beginning, rate at the end), in multiples of the base rate."""
PROMPTS, ANSWERS = (100, 450), (20, 60)
SLO = {"ttft": {"seconds": TTFT}, "tpot": {"seconds": TPOT}, "handoff_gap": {"seconds": 1.0}}
POLICY: dict[str, Any] = {"interval": 2.0, "window": 10.0, "flip": {"enabled": True, "cooldown": 5.0, "spare_for": 5.0}}
POOL: dict[str, Any] = {
    "min": 1,
    "warm_up": 8.0,
    "down": {"cooldown": 5.0, "window": 12.0},
    "forecast": {"bin": 3.0, "half_life": 6.0, "trend_half_life": 6.0, "margin": 0.2, "recover": 10.0},
}
STILL: dict[str, Any] = {
    "targets": {"slo": None, "backlog_seconds": None, "kv_occupancy": None, "queue": None},
    "forecast": {"kind": "none"},
    "down": {"cooldown": 0.0, "window": 0.0},
}
"""A pool of which bounds alone decide."""


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
                rows.writerow((f"{at:.3f}", rng.randint(*PROMPTS), rng.randint(*ANSWERS)))
    return path


class Meter:
    """Counts engine-seconds while it is open."""

    def __init__(self, deployment: Deployment) -> None:
        self.seconds = dict.fromkeys(MOST, 0.0)
        self.timeline: list[str] = []
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
        begun = last = time.monotonic()
        known = ""
        while not self._over.wait(0.5):
            now, before = time.monotonic(), last
            last = now
            there = [engine for engine in self._deployment.engines().values() if engine["state"] != "dead"]
            for engine in there:
                self.seconds[engine["role"]] += now - before
            roles = [(role, [e["state"] for e in there if e["role"] == role]) for role in MOST]
            shown = ", ".join(f"{role} {states.count('ready')}/{len(states)}" for role, states in roles)
            if shown != known:
                known = shown
                self.timeline.append(f"{now - begun:.0f} s: {shown}")


def serve(rule: str, folder: Path, base: float, seed: int) -> dict[str, Any]:
    trace, report = write_trace(folder / "trace.csv", base, seed), folder / f"{rule}.json"
    if rule == "static":
        settings: dict[str, Any] = {"pools": {role: {"engines": count} for role, count in MOST.items()}}
    else:
        pools = {role: {**POOL, "max": count} for role, count in MOST.items()}
        settings = {"policies": str(write_config(folder / f"{rule}.yaml", {**POLICY, "slo": SLO, "pools": pools}))}
    with _started(rule, folder, settings) as deployment:
        busy_before = os.getloadavg()[0]
        with Meter(deployment) as meter:
            command = [sys.executable, "-c", "from pdserve.cli import main; main()", "loadgen", "run"]
            options = ["--url", deployment.url, "--trace", str(trace), "--json", str(report), "--warmup", "0"]
            slo = ["--slo", f"ttft={TTFT},tpot={TPOT}"]
            subprocess.run([*command, *options, *slo], check=False, stdout=subprocess.DEVNULL)
        scaling = httpx.get(f"{deployment.admin_url}/admin/scaling", timeout=10)
        decisions = scaling.json()["decisions"] if scaling.status_code == 200 else []
    body = json.loads(report.read_text())
    return {
        "requests": body["requests"],
        "failed": body["failed"],
        "errors": body["errors"],
        "attainment": round(body["verdict"]["attainment"], 4),
        "engine_seconds": {role: round(seconds) for role, seconds in meter.seconds.items()},
        "engine_seconds_total": round(sum(meter.seconds.values())),
        "ttft_p50": round(body["ttft"]["p50"], 3),
        "ttft_p95": round(body["ttft"]["p95"], 3),
        "tpot_p95": round(body["tpot"]["p95"], 4),
        "decisions": [f"{each['what']} [{each['rule']}]" for each in decisions],
        "timeline": meter.timeline,
        "load_average_before": round(busy_before, 2),
    }


def _started(rule: str, folder: Path, settings: dict[str, Any]) -> AbstractContextManager[Deployment]:
    config = write_config(
        folder / f"{rule}-cluster.yaml", {"device": "cpu", "slo": {"ttft": TTFT, "tpot": TPOT}, **settings}
    )
    command = (sys.executable, "-m", "benchmarks.paced_serve", rule, "serve", *FREE_PORTS, "--launcher", "process")
    return deployed(folder / f"{rule}.log", str(config), env={ENVIRONMENT: STEP.model_dump_json()}, command=command)


def flips(folder: Path, count: int) -> dict[str, Any]:
    """One of three engines goes to and fro between the roles, while answers are being written all the time."""
    path = folder / "flips.yaml"

    def order(prefill: int, decode: int) -> None:
        pools = {role: {**STILL, "min": n, "max": n} for role, n in (("prefill", prefill), ("decode", decode))}
        fresh = {"interval": 0.5, "window": 5.0, "bypass": {"enabled": False}, "pools": pools}
        flip = {"enabled": True, "cooldown": 0.0, "spare_for": 0.0}
        write_config(path.with_suffix(".new"), {**fresh, "flip": flip}).replace(path)

    order(1, 2)
    with _started("ours", folder, {"policies": str(path), "pools": {"decode": {"engines": 2}}}) as deployment:
        deployment.eventually(lambda: _ready(deployment, "decode") == 2, within=60)
        over, took = threading.Event(), list[float]()
        with ThreadPoolExecutor(8) as clients:
            streams = [clients.submit(_write, deployment, f"client {n} of eight", over) for n in range(8)]
            try:
                for turn in range(count):
                    prefill = 1 + (turn + 1) % 2
                    time.sleep(3.0)
                    order(prefill, 3 - prefill)
                    deployment.eventually(_has(deployment, prefill), within=30)
                    explained = httpx.get(f"{deployment.admin_url}/admin/scaling", timeout=10).json()
                    decided = max(each["at"] for each in explained["decisions"] if each["speed"] == "flip")
                    took.append(round(time.time() - decided, 2))
            finally:
                over.set()
            answers = _all(streams)
    return {
        "flips": count,
        "seconds": took,
        "answers": len(answers),
        "wrong_or_cut_answers": sum(answer != "" for answer in answers),
    }


def _has(deployment: Deployment, prefill: int) -> Callable[[], bool]:
    return lambda: _ready(deployment, "prefill") == prefill


def _ready(deployment: Deployment, role: str) -> int:
    return sum(each["role"] == role and each["state"] == "ready" for each in deployment.engines().values())


def _write(deployment: Deployment, prompt: str, over: threading.Event) -> list[str]:
    """Have the same answer written again and again; of each, what is wrong with it."""
    first, wrong = "", list[str]()
    while not over.is_set():
        answer = deployment.complete(prompt, max_tokens=100)
        text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""
        first = first or text
        whole = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 100
        wrong.append("" if whole and text == first else f"{answer.status_code}: {answer.text[:200]}")
    return wrong


def _all(streams: "list[Future[list[str]]]") -> list[str]:
    return [answer for stream in streams for answer in stream.result()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, action="append", help="default: all")
    parser.add_argument("--flips", type=int, metavar="N", help="measure so many changes of role instead")
    parser.add_argument("--rate", type=float, default=0.8, help="requests per second before the load triples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoscaling_real.json")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"benchmark": "autoscaling_real"}
    known |= {"slo": {"ttft": TTFT, "tpot": TPOT}, "shape": SHAPE, "most": MOST, "step": STEP.model_dump()}
    known |= {"base_rate": arguments.rate, "seed": arguments.seed, "policy": {**POLICY, "pool": POOL}}
    with TemporaryDirectory() as folder:
        if arguments.flips:
            known["role_flips"] = flips(Path(folder), arguments.flips)
            print(json.dumps(known["role_flips"]))
        for rule in () if arguments.flips else arguments.rule or RULES:
            known[rule] = serve(rule, Path(folder), arguments.rate, arguments.seed)
            print(rule, json.dumps(known[rule]), flush=True)
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")
    arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
