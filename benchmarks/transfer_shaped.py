"""Handoffs over links of 1 to 10 Gb/s while prefill still computes, and in bulk afterwards.

Needs root, `ip` and `tc`: the source runs in one network namespace and the target in another, joined by a veth pair
whose source end a token bucket shapes. Nothing outside these namespaces is touched. A prompt of four equal chunks
becomes final chunk by chunk, either slower than the link carries a chunk (the link outruns production) or faster.

    attached     the target attaches at once, and its own forecast decides between progressive and bulk. Where the link
                 outruns production, the time from the last chunk's end to the lease's release, over the time of a raw
                 read of one chunk; elsewhere, from the first ready region on, over a raw read of the whole prompt
    bulk         the same for a target that attaches only when all is computed

Raw reads go over the same link, right before the handoff they are compared with.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.transfer_target import Target

RATES_GBIT = (1, 2.5, 5, 10)
CHUNKS = 4
CHUNK_MIB = {1: 8, 2.5: 16, 5: 32, 10: 32}
BLOCK_KIB = 256
SOURCE, TARGET = "10.77.19.1", "10.77.19.2"
NAMES = {"source": f"pdserve-src-{os.getpid()}", "target": f"pdserve-dst-{os.getpid()}"}
BURST, LATENCY = "1mb", "30ms"
"""A burst above the largest packet that segmentation offload makes; a queue deep enough for TCP."""


@contextmanager
def namespaces() -> Iterator[None]:
    try:
        for name in NAMES.values():
            _run("ip", "netns", "add", name)
        _run(
            *("ip", "link", "add", "source", "netns", NAMES["source"]),
            *("type", "veth", "peer", "name", "target", "netns", NAMES["target"]),
        )
        for side, address in (("source", SOURCE), ("target", TARGET)):
            _run("ip", "-n", NAMES[side], "address", "add", f"{address}/24", "dev", side)
            for device in ("lo", side):
                _run("ip", "-n", NAMES[side], "link", "set", device, "up")
        yield
    finally:
        for name in NAMES.values():
            subprocess.run(["ip", "netns", "delete", name], check=False)


def shape(source: str, gbit: float) -> None:
    rate = f"{int(gbit * 1000)}mbit"
    _run(
        "tc",
        "-n",
        source,
        "qdisc",
        "replace",
        "dev",
        "source",
        "root",
        "tbf",
        *("rate", rate, "burst", BURST, "latency", LATENCY),
    )


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


async def measure(source_name: str, backend: str, rounds: int, rng: random.Random) -> list[dict[str, Any]]:
    """Inside the target's namespace."""
    shape(source_name, RATES_GBIT[-1])
    target = await Target.open(backend, BLOCK_KIB, TARGET, SOURCE, ("ip", "netns", "exec", source_name))
    try:
        rows = []
        for gbit in RATES_GBIT:
            shape(source_name, gbit)
            rows += [await _at_rate(target, gbit, slower, rounds, rng) for slower in (True, False)]
        return rows
    finally:
        await target.close()


async def _at_rate(target: Target, gbit: float, outrun: bool, rounds: int, rng: random.Random) -> dict[str, Any]:
    count = (CHUNK_MIB[gbit] << 10) // BLOCK_KIB
    samples: dict[str, list[float]] = {"attached": [], "bulk": [], "gbit_measured": []}
    for _ in range(rounds):
        source, blocks = (rng.sample(range(target.layout.num_blocks), CHUNKS * count) for _ in range(2))
        chunk = target.read(source[:count], blocks[:count], digest=False)
        whole = target.read(source, blocks, digest=False)
        pace = 1.5 * chunk if outrun else 0.3 * chunk
        handoff = await target.handoff(source, blocks, chunks=CHUNKS, chunk_seconds=pace)
        bulk = await target.handoff(source, blocks, chunks=CHUNKS, chunk_seconds=pace, bulk=True)
        unit, taken = (chunk, handoff.after_last) if outrun else (whole, handoff.since_first)
        waited = 0.0 if outrun else (CHUNKS - 1) * pace
        samples["attached"].append(taken / unit)
        samples["bulk"].append((waited + bulk.after_last) / unit)
        samples["gbit_measured"].append(CHUNKS * CHUNK_MIB[gbit] * 2**20 * 8 / whole / 1e9)
    return {
        "gbit": gbit,
        "chunk_mib": CHUNK_MIB[gbit],
        "link_outruns_production": outrun,
        **{name: round(statistics.median(values), 3) for name, values in samples.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, as in docs/kv-transfer.md."""
    lines = ["| link | raw read | production | attached | bulk |", "|---|---|---|---|---|"]
    for row in rows:
        production = "slower than the link" if row["link_outruns_production"] else "faster than the link"
        figures = [f"{row[name]:.2f}" for name in ("attached", "bulk")]
        lines.append(
            f"| {row['gbit']:g} Gb/s | {row['gbit_measured']:.2f} Gb/s | {production} | {' | '.join(figures)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", default="nixl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transfer_shaped.json")
    parser.add_argument("--source-namespace", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.source_namespace:
        with namespaces():
            command = [sys.executable, "-m", "benchmarks.transfer_shaped", *sys.argv[1:]]
            inner = [*command, "--source-namespace", NAMES["source"]]
            environment = os.environ | {"UCX_TLS": "tcp"}  # one machine: UCX would copy past the link
            subprocess.run(["ip", "netns", "exec", NAMES["target"], *inner], check=True, env=environment)
        return
    load = os.getloadavg()
    rows = asyncio.run(measure(args.source_namespace, args.backend, args.rounds, random.Random(0)))
    report = {
        "benchmark": "transfer_shaped",
        "backend": args.backend,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(load[0], 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "rounds": args.rounds,
        "block_kib": BLOCK_KIB,
        "chunks": CHUNKS,
        "results": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
