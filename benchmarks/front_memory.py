"""Half an hour at a high rate: does the gateway's process grow?

The gateway of `benchmarks.front`, with engines that tell of a new prompt's blocks and remove the oldest ones when they
are full, so that its index turns over. Clients stream one answer after the other. The slope of the memory resident in
the process (Theil and Sen's: the median over all pairs of looks) counts after a warm-up, in which allocators, pools and
the index fill up.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.front import Tally, client, front, rss_mb
from benchmarks.other_load import Moment

LOOK_EVERY = 10.0
WARM_UP = 1 / 3
"""Of the run."""
AIM = 0.1
"""MB per minute."""
CLIENTS, OUTPUT_TOKENS = 32, 32
PACE = 0.01


async def run(minutes: float) -> dict[str, Any]:
    looks: list[tuple[float, float]] = []
    tally, seeds = Tally(), asyncio.Queue[int]()
    seeds.put_nowait(0)
    async with front(PACE, stores=True) as gateway, asyncio.TaskGroup() as group:
        clients = [
            group.create_task(client(gateway.port, seeds, tally, OUTPUT_TOKENS, stream=True)) for _ in range(CLIENTS)
        ]
        begun, before = time.monotonic(), Moment.now([gateway.pid])
        while time.monotonic() - begun < 60 * minutes:
            await asyncio.sleep(LOOK_EVERY)
            looks.append(((time.monotonic() - begun) / 60, rss_mb(gateway.pid)))
            print(f"{looks[-1][0]:6.2f} min {looks[-1][1]:7.1f} MB {tally.requests} requests", flush=True)
        after = Moment.now([gateway.pid])
        for each in clients:
            each.cancel()
    return {
        "requests": tally.requests,
        "requests_per_second": tally.requests / (after.at - before.at),
        "gateway_cores": (after.ours - before.ours) / (after.at - before.at),
        "mb_per_minute": slope(looks[int(len(looks) * WARM_UP) :]),
        "mb": [round(mb, 1) for _, mb in looks],
    }


def slope(looks: list[tuple[float, float]]) -> float:
    return statistics.median((b - a) / (then - now) for (now, a), (then, b) in combinations(looks, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "front_memory.json")
    arguments = parser.parse_args()
    load_average = os.getloadavg()[0]
    result = asyncio.run(run(arguments.minutes))
    told = {"benchmark": "front_memory", "minutes": arguments.minutes, "load_average": load_average, "aim": AIM}
    arguments.out.write_text(json.dumps(told | result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "mb"}))
    raise SystemExit(result["mb_per_minute"] > AIM)


if __name__ == "__main__":
    main()
