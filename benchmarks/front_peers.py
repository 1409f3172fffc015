"""Our gateway beside the routers of others, under one load: CPU time per request and per token, TTFT, memory.

The others, their engines without a model and the load generator come from a harness outside this repository
(docs/benchmarking.md tells how to have it). Ours is the gateway of benchmarks.front, with the same tokenizer. All of
them are up at once; a cycle gives each a short window of load, in drawn order, and ratios are taken within a cycle.
One of the others is there twice: how far its two ratios lie from 1 tells what a ratio is worth here.
"""

import argparse
import asyncio
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.front import front
from benchmarks.other_load import Moment

OURS, LIKE_OURS, BASE, AGAIN = "pdserve", "dyn-kv-pd", "smg-pd", "smg-pd again"
"""LIKE_OURS also templates, tokenizes and detokenizes. BASE passes bytes through; AGAIN is another of it."""
PEERS = (LIKE_OURS, BASE, AGAIN, "vllmr-pd")
WARM_UP = 0.5
PACE = 0.005
"""Seconds between two tokens of a stream where engines are paced."""
_COUNTED = ("pdserve_time_to_first_token_seconds_count", "pdserve_inter_token_latency_seconds_count")
"""Of these our gateway observes one for each token it sends."""


@dataclass(frozen=True)
class Target:
    port: int
    pids: tuple[int, ...]
    metrics_port: int | None = None


@asynccontextmanager
async def targets(harness: Any, paced: bool) -> AsyncIterator[dict[str, Target]]:
    """Everybody, ready and checked."""
    async with front(PACE if paced else 0.0, f"{harness.B}/tiny") as ours:
        try:
            up = {OURS: Target(ours.port, ours.pids, ours.admin_port)}
            for slot, name in enumerate(PEERS):
                up[name] = await asyncio.to_thread(_start, harness, slot, name, paced)
            for name, target in up.items():
                _check(harness, name, target)
            yield up
        finally:
            await asyncio.to_thread(harness.stop_all)


def _start(harness: Any, slot: int, name: str, paced: bool) -> Target:
    harness.at(slot)
    port, router, _ = harness.target(name.removesuffix(" again"), harness.PACE if paced else ())
    harness.wait_ready(port)
    return Target(port, tuple(harness.kids(router.pid)[:16]))


def _check(harness: Any, name: str, target: Target) -> None:
    """A stream of 128 tokens comes whole, from everybody but us in as many events: ours join tokens under load."""
    events, tokens, done = harness.check_stream(target.port)
    assert tokens == 128, (name, tokens)
    assert done, name
    assert 0 < events <= 128 if name == OURS else events == 128, (name, events)


def window(harness: Any, suite: str, name: str, target: Target, seconds: float) -> dict[str, Any]:
    """One window of a suite's load on a target."""
    _, bodies, concurrency, extra = harness.SUITES[suite]
    command = [f"{harness.B}/pbload", "--port", target.port, "--key", harness.KEY, "--bodies"]
    command += [f"{harness.B}/{bodies}.jsonl", "-c", concurrency, "-d", seconds, "-w", WARM_UP, *extra]
    command += ["--label", suite, "--pid", f"router:{','.join(map(str, target.pids))}"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as load:
        time.sleep(WARM_UP)
        begun = _count(target)
        time.sleep(seconds - 0.05)
        ended = _count(target)
        assert load.stdout is not None
        measured: dict[str, Any] = json.loads(load.stdout.read())
    assert not measured["err"], (name, measured)
    return _figures(measured, begun, ended)


def _figures(measured: dict[str, Any], begun: "_Count | None", ended: "_Count | None") -> dict[str, Any]:
    router, ttft = measured["router"], measured["ttft_ms"]
    figures = {"rss_mb": router["rss_mb"]}
    if not ttft:
        return figures | {
            "requests_per_second": measured["rps"],
            "cpu_seconds_per_thousand_requests": router["cpu_s_per_1k_req"],
        }
    tokens, per_token = measured["tps"], router["cpu_s_per_1M_tok"]
    if begun and ended:
        tokens = (ended.tokens - begun.tokens) / (ended.at - begun.at)
        per_token = 1e6 * (ended.cpu - begun.cpu) / max(1.0, ended.tokens - begun.tokens)
    return figures | {
        "tokens_per_second": tokens,
        "events_per_second": measured["tps"],
        "cpu_seconds_per_million_tokens": per_token,
        "ttft_p50_ms": ttft["p50"],
        "ttft_p99_ms": ttft["p99"],
        "itl_p99_ms": measured["itl_ms"]["p99"],
    }


@dataclass(frozen=True)
class _Count:
    at: float
    tokens: float
    cpu: float


def _count(target: Target) -> _Count | None:
    """Tokens our gateway has sent so far, which are more than the events it sent them in. None for others: there
    the load generator's count is right."""
    if target.metrics_port is None:
        return None
    with urllib.request.urlopen(f"http://127.0.0.1:{target.metrics_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    moment = Moment.now(target.pids)
    return _Count(moment.at, sum(float(line.split()[1]) for line in lines if line.startswith(_COUNTED)), moment.ours)


def compared(windows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of one suite and run: every target's figures, and their ratios to LIKE_OURS and BASE within a cycle."""
    return {
        name: {
            "figures": {figure: _spread([each[figure] for each in own]) for figure in own[0]},
            **{
                f"ratio to {other}": {
                    figure: _spread(ratios)
                    for figure in own[0]
                    if (ratios := list(_ratios(own, windows[other], figure)))
                }
                for other in (LIKE_OURS, BASE)
            },
        }
        for name, own in windows.items()
    }


def _ratios(own: list[dict[str, Any]], other: list[dict[str, Any]], figure: str) -> Iterator[float]:
    return (mine[figure] / theirs[figure] for mine, theirs in zip(own, other, strict=True) if theirs[figure])


def _spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


async def measure(harness: Any, suites: list[str], cycles: int, seconds: float) -> dict[str, Any]:
    """suite → compared. Either all of the suites are paced, or none is."""
    rng, results = random.Random(), {}
    async with targets(harness, paced=suites[0].startswith("paced")) as up:
        for suite in suites:
            windows: dict[str, list[dict[str, Any]]] = {name: [] for name in up}
            for _ in range(cycles):
                for name in rng.sample(list(up), len(up)):
                    windows[name].append(await asyncio.to_thread(window, harness, suite, name, up[name], seconds))
                    await asyncio.sleep(0.15)
            results[suite] = compared(windows) | {"load_average": os.getloadavg()[0]}
            _print(suite, results[suite])
    return results


def _print(suite: str, result: dict[str, Any]) -> None:
    for name, told in result.items():
        if name == "load_average":
            continue
        for figure, (middle, least, most) in told["figures"].items():
            to = "  ".join(f"{told[f'ratio to {other}'].get(figure, '-')}" for other in (LIKE_OURS, BASE))
            print(f"{suite:13} {name:13} {figure:34} {middle:10.4g} [{least:.4g}-{most:.4g}]  {to}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--harness", type=Path, required=True, help="its folder; it works in $PEERBENCH_HOME")
    parser.add_argument("--suites", default="ns8_c64,st_c64,st_c256,lat_c1q", help="its names of loads")
    parser.add_argument("--cycles", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one window")
    parser.add_argument("--run", default="1", help="name of this run in the results")
    parser.add_argument("--out", type=Path, help="results are added to those that are there")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.harness))
    harness = importlib.import_module("runbench")
    measured = asyncio.run(measure(harness, arguments.suites.split(","), arguments.cycles, arguments.seconds))
    if arguments.out:
        told = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        for suite, result in measured.items():
            told.setdefault(suite, {})[f"run {arguments.run}"] = result
        arguments.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
