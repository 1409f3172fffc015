"""How long a gateway's event loop stands still for one long prompt, hashed by the loop itself and by a thread.

A gateway's way of a prompt from its token ids to its route: prepared or not, admitted, routed among 16 engines, booked.
Beside it a task asks for its turn again and again; its longest wait is what every other request would feel. Both ways
take turns; medians over all prompts.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.routing_decision import PROMPT_TOKENS, Deployment
from pdserve.core.request import Request
from pdserve.gateway.hashing import PromptHasher


async def longest_wait(stop: asyncio.Event) -> float:
    """Seconds between two turns of the loop, at most, until stop."""
    longest, last = 0.0, time.perf_counter()
    while not stop.is_set():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


async def one(deployment: Deployment, request: Request, hasher: PromptHasher | None) -> tuple[float, float]:
    """(longest wait of others, seconds until the route) of one prompt."""
    stop = asyncio.Event()
    watching = asyncio.create_task(longest_wait(stop))
    await asyncio.sleep(0)
    begun = time.perf_counter()
    if hasher:
        await hasher(request)
    route = deployment.router.route(request, deployment.pool.state())
    with deployment.pool.book(request, route):
        taken = time.perf_counter() - begun
        stop.set()
        return await watching, taken


async def measure(count: int, seed: int) -> dict[str, dict[str, float]]:
    """Milliseconds."""
    deployment = Deployment(16, "kv_aware", seed)
    hasher = PromptHasher(deployment.router)
    found: dict[str, list[tuple[float, float]]] = {"by_the_loop": [], "by_a_thread": []}
    gc.collect()
    gc.freeze()
    for number in range(-count // 4, count):
        for way, prepare in (("by_the_loop", None), ("by_a_thread", hasher)):
            prompt = deployment.prompts[number % len(deployment.prompts)]
            pair = await one(deployment, replace(prompt, id=f"{way}-{number}"), prepare)
            if number >= 0:
                found[way].append(pair)
    return {
        way: {
            "longest_wait_p50": 1e3 * statistics.median(wait for wait, _ in pairs),
            "longest_wait_p90": 1e3 * statistics.quantiles([wait for wait, _ in pairs], n=10)[8],
            "to_the_route_p50": 1e3 * statistics.median(taken for _, taken in pairs),
        }
        for way, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "event_loop.json")
    args = parser.parse_args()
    milliseconds = asyncio.run(measure(args.prompts, args.seed))
    ratio = milliseconds["by_a_thread"]["longest_wait_p50"] / milliseconds["by_the_loop"]["longest_wait_p50"]
    result = {
        "benchmark": "event_loop",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "prompt_tokens": PROMPT_TOKENS,
        "prompts": args.prompts,
        "milliseconds": milliseconds,
        "longest_wait_ratio": ratio,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
