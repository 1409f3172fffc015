"""What verifying costs a KV transfer: plain copies and reads against handoffs in which every byte is digested twice.

Between two processes on this machine, in one run, the ways taking turns:

    memcpy      blocks copied within this process
    raw         reads of the backend, nothing else
    in series   each region read, then digested, in one thread
    pipelined   whole handoffs over gRPC: the source digests region after region, the target reads one while it
                verifies another, and releases the lease at the end

Blocks are permuted on both sides, so none are adjacent. Figures are medians with quartiles; ratios are medians of the
ratios within a round, which a machine's changing load moves least. The control overhead is a handoff's time beyond a
raw read of as many bytes, both digests among it.

A round in which other processes took more than a tenth of the cores does not count, unless there were too few others:
then all do, and the row says that it is not quiet.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.quiet import QUIET, until_quiet, usage
from benchmarks.transfer_target import Blocks, Target, check_bytes
from pdserve.transfer.memory import HostMemory

BACKENDS = ("nixl", "shared_memory")
BLOCK_KIB = (256, 1024)
PAYLOAD_MIB = 256
"""Of 512 MiB: 2k tokens of a model of 8 billion parameters. What a handoff costs once is in the control column."""
CONTROL_BLOCKS = 16
WARM_UP = 2


def memcpy(target: Target, origin: HostMemory, source: Blocks, blocks: Blocks) -> float:
    """Seconds to copy the blocks from memory of this process."""
    size = target.layout.block_bytes
    begun = time.perf_counter()
    for there, here in zip(source, blocks, strict=True):
        target.memory.array[here * size : (here + 1) * size] = origin.array[there * size : (there + 1) * size]
    return time.perf_counter() - begun


async def measure(backend: str, block_kib: int, rounds: int, seconds_left: float, rng: random.Random) -> dict[str, Any]:
    """Until so many rounds were quiet, or the time is over; then all rounds count."""
    target = await Target.open(backend, block_kib)
    origin = HostMemory(target.layout.total_bytes)
    origin.array[:] = np.random.default_rng(1).integers(0, 256, origin.nbytes, dtype=np.uint8)
    count = (PAYLOAD_MIB << 10) // block_kib
    taken: list[tuple[float, dict[str, float]]] = []
    deadline = time.monotonic() + seconds_left
    try:
        while not _enough(taken, rounds, time.monotonic() > deadline):
            await until_quiet((target.source_pid,), deadline)
            source, blocks = (rng.sample(range(target.layout.num_blocks), count) for _ in range(2))
            before = usage((target.source_pid,))
            samples = await _round(target, origin, source, blocks, rng)
            samples["control"] = await _control(target, source, blocks)
            taken.append((usage((target.source_pid,)).others_since(before), samples))
        target.memory.array[:] = 0
        await target.handoff(source, blocks)
        check_bytes(target, source, blocks)
    finally:
        origin.close()
        await target.close()
    quiet = [samples for others, samples in taken[WARM_UP:] if others < QUIET]
    enough = len(quiet) >= rounds // 2
    counted = quiet if enough else [samples for _, samples in taken[WARM_UP:]]
    return {"quiet": enough, "rounds": len(counted)} | _summary(counted, PAYLOAD_MIB << 20)


def _enough(taken: list[tuple[float, dict[str, float]]], rounds: int, late: bool) -> bool:
    """So many quiet rounds; when it is late, so many of any kind."""
    return sum(late or others < QUIET for others, _ in taken) >= rounds + WARM_UP


async def _round(
    target: Target, origin: HostMemory, source: Blocks, blocks: Blocks, rng: random.Random
) -> dict[str, float]:
    taken: dict[str, float] = {}
    for name in rng.sample(("memcpy", "raw", "in series", "pipelined"), 4):
        match name:
            case "memcpy":
                taken[name] = memcpy(target, origin, source, blocks)
            case "pipelined":
                taken[name] = (await target.handoff(source, blocks)).seconds
            case _:
                taken[name] = target.read(source, blocks, digest=name == "in series")
    return taken


async def _control(target: Target, source: Blocks, blocks: Blocks) -> float:
    """Seconds of a handoff of a few blocks beyond a raw read of as many others: neither finds its bytes in a cache."""
    handed, read = slice(CONTROL_BLOCKS), slice(CONTROL_BLOCKS, 2 * CONTROL_BLOCKS)
    handoff = (await target.handoff(source[handed], blocks[handed])).seconds
    return handoff - target.read(source[read], blocks[read], digest=False)


def _summary(rounds: list[dict[str, float]], num_bytes: int) -> dict[str, Any]:
    seconds = {name: [samples[name] for samples in rounds] for name in rounds[0]}
    control = seconds.pop("control")
    ratios = {
        f"pipelined of {name}": _quartiles(_ratios(seconds[name], seconds["pipelined"])) for name in ("raw", "memcpy")
    }
    ratios["in series of raw"] = _quartiles(_ratios(seconds["raw"], seconds["in series"]))
    return {
        "gigabytes_per_second": {
            name: _quartiles([num_bytes / value / 1e9 for value in values]) for name, values in seconds.items()
        },
        "ratios": ratios,
        "control_milliseconds_16_blocks": _quartiles([value * 1e3 for value in control]),
    }


def _ratios(baseline: list[float], values: list[float]) -> list[float]:
    return [plain / value for plain, value in zip(baseline, values, strict=True)]


def _quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4)
    return {"median": round(median, 3), "q1": round(q1, 3), "q3": round(q3, 3)}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/kv-transfer.md."""
    lines = [
        "| backend | block | memcpy | raw | in series | pipelined | of raw | of memcpy | control, 16 blocks | quiet |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        speeds = [
            f"{row['gigabytes_per_second'][n]['median']:.2f}" for n in ("memcpy", "raw", "in series", "pipelined")
        ]
        ratios = [f"{row['ratios'][f'pipelined of {name}']['median']:.2f}" for name in ("raw", "memcpy")]
        control = f"{row['control_milliseconds_16_blocks']['median']:.2f} ms"
        quiet = "yes" if row["quiet"] else "no"
        cells = [row["backend"], f"{row['block_kib']} KiB", *speeds, *ratios, control, quiet]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for quiet rounds, per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer.json")
    args = parser.parse_args()
    load = os.getloadavg()
    results = []
    for backend in BACKENDS:
        for block_kib in BLOCK_KIB:
            rng = random.Random(args.seed)
            row = uvloop.run(measure(backend, block_kib, args.rounds, args.patience, rng))
            results.append({"backend": backend, "block_kib": block_kib} | row)
    report = {
        "benchmark": "transfer",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load[0], 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "seed": args.seed,
        "payload_mib": PAYLOAD_MIB,
        "results": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
