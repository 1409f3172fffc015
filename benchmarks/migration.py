"""How long a client waits for a token while its request moves between two decode engines.

One stream of the demo model with a context of 4,096 tokens and more is moved back and forth through the admin port,
alone and beside other streams, and its tokens are compared with those of the same request left alone. Per move: the
gap in which the client saw it (between two events of its stream), the pause as the gateway has it, and what was moved.
The gaps in which nothing moved are the base line. Both are told once more for the time in which nobody else used the
machine: a token takes as long as it does anyway, and longer beside other work.
"""

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import httpx

from benchmarks.other_load import Moment, others_cores
from tests.deployment import Deployment, deployed, write_config

CONTEXT = 4096
VOCABULARY = 4000
TARGET_MS = 50.0
BETWEEN = 0.15
"""Seconds of decoding between two moves."""
QUIET = 0.25
"""Cores that others may use in a quiet stretch of time; the kernel's share of our own traffic counts as others'."""
SETTINGS = {
    "device": "cpu",
    "max_model_len": 8192,
    "kv": {"num_blocks": 1024},
    "pools": {"decode": {"engines": 2, "prefix_caching": False}},  # or the way back would be short
    "limits": {"request_timeout": 600},
}


class Client:
    """One streamed completion: when each event came (Unix seconds), what it said, and its record."""

    def __init__(self, deployment: Deployment, prompt: list[int], max_tokens: int, name: str, seed: int) -> None:
        self._url = f"{deployment.url}/v1/completions"
        self._headers = {"x-request-id": name}
        self._body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.7,
            "seed": seed,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }
        self.arrivals: list[float] = []
        self.said: list[tuple[str, list[float]]] = []
        self.record: dict[str, Any] = {}
        self.decoding = threading.Event()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, headers=self._headers, timeout=300) as response:
            response.raise_for_status()
            rest = b""
            for piece in response.iter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line.removeprefix(b"data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise RuntimeError(event["error"])
        self.record = event.get("pdserve") or self.record
        for choice in event["choices"]:
            if choice["text"]:
                self.arrivals.append(time.time())
                self.said.append((choice["text"], (choice["logprobs"] or {}).get("token_logprobs", [])))
                if len(self.arrivals) > 8:
                    self.decoding.set()

    @property
    def answer(self) -> tuple[str, list[float]]:
        return "".join(text for text, _ in self.said), [value for _, values in self.said for value in values]


class Watch(threading.Thread):
    """How many cores others have used, in stretches of WATCHED seconds. Use as a context manager."""

    WATCHED = 0.25

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._pids = pids
        self._over = threading.Event()
        self._ends: list[float] = []
        self._cores: list[float] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        before = Moment.now(self._pids)
        while not self._over.wait(self.WATCHED):
            now = Moment.now(self._pids)
            self._ends.append(time.time())
            self._cores.append(others_cores(before, now))
            before = now

    def quiet(self, begin: float, end: float) -> bool:
        """Whether that part of the time (Unix seconds) was."""
        return max(self._cores[bisect(self._ends, begin) : bisect(self._ends, end) + 1], default=0.0) < QUIET


def move_until(client: Client, name: str, deployment: Deployment, over: Callable[[], bool]) -> None:
    """Move it again and again while it decodes."""
    client.decoding.wait(120)
    with httpx.Client(timeout=60) as admin:
        while not over():
            answer = admin.post(f"{deployment.admin_url}/admin/requests/{name}/move")
            if answer.status_code == 400:  # it has ended
                return
            time.sleep(BETWEEN)


def measure(deployment: Deployment, rng: random.Random, moves: int, others: int, watch: Watch) -> dict[str, Any]:
    """One case: `moves` moves or more of a stream, beside `others` short ones that never end before it."""
    samples: list[dict[str, float]] = []
    gaps: list[tuple[float, float]] = []
    outcomes: dict[str, int] = {}
    different = rounds = 0
    with ThreadPoolExecutor(others + 2) as pool:
        while len(samples) < moves:
            rounds += 1
            prompt, seed = [rng.randrange(VOCABULARY) for _ in range(CONTEXT)], rng.randrange(2**31)
            for moved in (True, False):
                name = f"bench-{rng.randrange(2**40)}"
                client = Client(deployment, prompt, 900, name, seed)
                beside = [
                    Client(deployment, [rng.randrange(VOCABULARY) for _ in range(64)], 1500, "", seed)
                    for _ in range(others if moved else 0)
                ]
                for other in beside:
                    pool.submit(other.run)
                running = pool.submit(client.run)
                if moved:
                    move_until(client, name, deployment, running.done)
                    running.result()
                    _collect(client, samples, gaps, outcomes)
                    wanted = client.answer
                else:
                    running.result()
                    different += client.answer != wanted
    quiet = [sample for sample in samples if watch.quiet(sample["ended"] - sample["gap"], sample["ended"])]
    return {
        "moves": len(samples),
        "rounds": rounds,
        "outcomes": outcomes,
        "answers_that_differ": different,
        "client_gap_ms": summary([sample["gap"] for sample in samples]),
        "pause_ms": summary([sample["pause"] for sample in samples]),
        "from_asked_to_moved_ms": summary([sample["whole"] for sample in samples]),
        "gap_without_move_ms": summary([gap for _, gap in gaps]),
        "while_quiet": {
            "moves": len(
                quiet := [each for each in samples if watch.quiet(each["ended"] - each["gap"], each["ended"])]
            ),
            "client_gap_ms": summary([sample["gap"] for sample in quiet]),
            "pause_ms": summary([sample["pause"] for sample in quiet]),
            "gap_without_move_ms": summary([gap for end, gap in gaps if watch.quiet(end - gap, end)]),
        },
        "bytes": summary([sample["bytes"] for sample in samples], scale=1.0),
        "context_tokens": {"from": CONTEXT, "to": CONTEXT + 900},
    }


def _collect(
    client: Client, samples: list[dict[str, float]], gaps: list[tuple[float, float]], outcomes: dict[str, int]
) -> None:
    """A move is seen in the gap that its end, the first token from the target, closes."""
    closed: set[int] = set()
    for move in client.record["migrations"]:
        outcomes[move["outcome"]] = outcomes.get(move["outcome"], 0) + 1
        if move["outcome"] != "ok":
            continue
        index = bisect(client.arrivals, move["ended"] - 0.0005)
        if 0 < index < len(client.arrivals):
            closed.update((index - 1, index, index + 1))
            gap = max(
                client.arrivals[at] - client.arrivals[at - 1]
                for at in (index - 1, index, index + 1)
                if 0 < at < len(client.arrivals)
            )
            samples.append(
                {
                    "gap": gap,
                    "pause": move["pause"],
                    "whole": move["ended"] - move["asked"],
                    "ended": move["ended"],
                    "bytes": move["bytes"],
                }
            )
    between = [(later, later - earlier) for earlier, later in pairwise(client.arrivals)]
    gaps += [gap for at, gap in enumerate(between, start=1) if at not in closed]


def summary(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """Percentiles by nearest rank; of nothing, nothing."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * scale, 3)

    return {
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": at(1.0),
        "mean": round(statistics.fmean(ordered) * scale, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=110)
    parser.add_argument("--others", type=int, nargs="*", default=[0, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "migration.json")
    args = parser.parse_args()
    cases = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        config = write_config(folder / "cluster.yaml", SETTINGS)
        deployment = stack.enter_context(deployed(folder / "serve.log", str(config)))
        rng = random.Random(args.seed)
        for others in args.others:
            ours = [os.getpid(), *deployment.children()]
            before = Moment.now(ours)
            with Watch(ours) as watch:
                case = measure(deployment, rng, args.moves, others, watch)
            case["cores_busy_with_other_work"] = round(others_cores(before, Moment.now(ours)), 2)
            cases[f"{others} other streams"] = case
            print(f"{others} other streams:", json.dumps(case, indent=1))
    report = {
        "benchmark": "migration",
        "model": "demo",
        "device": "cpu",
        "machine": platform.machine(),
        "seed": args.seed,
        "target_p99_ms": TARGET_MS,
        "cases": cases,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
