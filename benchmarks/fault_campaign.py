"""Thousands of requests through a cluster whose engines are killed and frozen all the time.

Rounds of concurrent streams run against 2 prefill and 2 decode engines; in each round one engine dies or freezes at
a named point. Clients and gateway write down what they saw; `tests.faults.judge` then counts requests that were lost,
ended twice, or got other tokens than an undisturbed engine gives. `--logs FOLDER` keeps both sides' event logs, and
what the engines and the gateway said of a stream that hung.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.faults.judge import ClientEvent, Verdict, judge
from tests.faults.test_no_request_lost import DECODE_POINTS, POOLS, PREFILL_POINTS, make_asks
from tests.streams import Ask, Stream, ask, expected
from tests.strikes import order_strike

STREAMS = 96
STRIKE_WITHIN = 1.5
"""Seconds from the first stream's start, chosen at random, after which the next passage of the point strikes."""


@dataclass(frozen=True)
class Bench:
    deployment: Deployment
    failpoints: Path
    log: Path
    asks: list[Ask]
    wanted: list[str]


@contextmanager
def opened(launcher: str, logs: Path) -> Iterator[Bench]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "model", "qwen3")
        (folder / "failpoints").mkdir()
        settings = {
            "model": str(checkpoint),
            "device": "cpu",
            "routing": {"decode_local_below": 0},
            # Whoever comes while half the engines are gone is served late here, not refused.
            "slo": {"ttft": 60.0},
            "kv": {"num_blocks": 2048},
            "pools": POOLS,
            "log": {"format": "json"},
            # Engines die all the time here, on purpose.
            "times": {"restart_backoff_max": 1.0},
        }
        config = write_config(folder / "cluster.yaml", settings)
        log, env = logs / "serve.log", {ENVIRONMENT: str(folder / "failpoints")}
        asks = make_asks(STREAMS, max_tokens=192)
        wanted = [answer_hash(a.text, a.logprobs or ()) for a in expected(checkpoint, asks)]
        with deployed(log, str(config), "--launcher", launcher, env=env) as deployment:
            yield Bench(deployment, folder / "failpoints", log, asks, wanted)


def answer_hash(text: str, logprobs: tuple[float, ...]) -> str:
    return sha256(json.dumps([text, logprobs]).encode()).hexdigest()


def run_round(bench: Bench, number: int, rng: random.Random) -> tuple[str, list[ClientEvent]]:
    """One strike under one wave of streams; returns how it struck and what the clients saw."""
    bench.deployment.eventually(lambda: whole(bench.deployment), within=60)
    role, points = rng.choice([("prefill", PREFILL_POINTS), ("decode", DECODE_POINTS)])
    victim, point = f"{role}-{rng.randrange(2)}", rng.choice(points)
    blow = "kill" if rng.random() < 0.8 else "stop"
    with ThreadPoolExecutor(len(bench.asks)) as clients:
        ids = [f"c{number}-{n}" for n in range(len(bench.asks))]
        running = [clients.submit(ask_patiently, bench, a, id) for a, id in zip(bench.asks, ids, strict=True)]
        time.sleep(rng.uniform(0, STRIKE_WITHIN))
        order = order_strike(bench.failpoints, victim, point, blow)
        streams = [future.result() for future in running]
    order.unlink(missing_ok=True)
    return blow, [_event(id, n, stream) for n, (id, stream) in enumerate(zip(ids, streams, strict=True))]


def ask_patiently(bench: Bench, request: Ask, id: str) -> Stream:
    """The stream, or an error in its place when no chunk came for so long that none will."""
    started = time.monotonic()
    try:
        return ask(bench.deployment, request, request_id=id)
    except httpx.HTTPError as failure:
        about = [f"{bench.deployment.admin_url}/admin/requests/{id}", f"{bench.deployment.admin_url}/admin/engines"]
        said = "\n".join(httpx.get(url, timeout=10).text for url in about)
        (bench.log.parent / f"hung-{id}.json").write_text(said, encoding="utf-8")
        print(f"{id}: {failure!r}", flush=True)
        return Stream(started, error={"message": repr(failure)})


def whole(deployment: Deployment) -> bool:
    return all(e["state"] == "ready" for e in deployment.engines().values())


def _event(id: str, number: int, stream: Stream) -> ClientEvent:
    return ClientEvent(
        id=id,
        ask=number,
        finish_reasons=tuple(stream.finish_reasons),
        answer_hash=answer_hash(stream.text, tuple(stream.logprobs)),
        error=stream.error["message"] if stream.error else "",
        failed_attempts=len(stream.record.get("failed_attempts", ())),
        longest_pause=stream.longest_pause,
    )


def run(faulted: int, seed: int, launcher: str, logs: Path) -> tuple[Verdict, dict[str, list[float]], int]:
    """Rounds until so many requests were hit. Returns the verdict, pauses of hit requests by blow, rounds."""
    rng = random.Random(seed)
    events: list[ClientEvent] = []
    pauses: dict[str, list[float]] = {"kill": [], "stop": []}
    rounds = 0
    with opened(launcher, logs) as bench, (logs / "clients.jsonl").open("w", encoding="utf-8") as clients:
        while sum(e.failed_attempts > 0 for e in events) < faulted:
            blow, seen = run_round(bench, rounds, rng)
            pauses[blow] += [event.longest_pause for event in seen if event.failed_attempts]
            events += seen
            clients.writelines(event.to_json() + "\n" for event in seen)
            rounds += 1
            hit = sum(e.failed_attempts > 0 for e in events)
            errors = sum(bool(event.error) for event in events)
            print(f"round {rounds}: {len(events)} requests, {hit} hit, {errors} errors", flush=True)
        bench.deployment.eventually(lambda: all_free(bench.deployment), within=20)
        log = bench.log.read_text(encoding="utf-8").splitlines()
        return judge(events, log, bench.wanted), pauses, rounds


def all_free(deployment: Deployment) -> bool:
    return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faulted", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fault_campaign.json")
    parser.add_argument("--launcher", choices=["process", "ray"], default="process")
    parser.add_argument("--logs", type=Path, help="keep the event logs here; nowhere if not given")
    args = parser.parse_args()
    with TemporaryDirectory() as elsewhere:
        logs = args.logs or Path(elsewhere)
        logs.mkdir(parents=True, exist_ok=True)
        verdict, pauses, rounds = run(args.faulted, args.seed, args.launcher, logs)
    report = {
        "benchmark": "fault_campaign",
        "seed": args.seed,
        "launcher": args.launcher,
        "rounds": rounds,
        "verdict": asdict(verdict),
        "longest_pause_seconds": {
            blow: {"median": statistics.median(values), "max": max(values)} for blow, values in pauses.items() if values
        },
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if verdict.clean else 1)


if __name__ == "__main__":
    main()
