"""The tiers below the device pool: how fast blocks come back, and what that is worth to a conversation.

`speed` restores a whole store, every block verified, and compares it with the plain operation of the same bytes in
the same repetition: memcpy for the host tier, a sequential read() of the tier's own file for the disk tier, with its
pages in the page cache (warm) and dropped from it (cold). Plain operations move 1 MiB at a time.

`conversations` talks to an engine of the demo model whose pool holds a tenth of what is said, with tiers and
without: hits by tier, and the time to the first token of every turn but the first.

    python -m benchmarks.tiers --out benchmarks/results/tiers.json
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pdserve.config.schema import Config
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.request import SamplingParams
from pdserve.tiers.device import device_blocks
from pdserve.tiers.disk import DiskTier
from pdserve.tiers.host import HostTier
from pdserve.tiers.restore import Restorer
from pdserve.tiers.slot_file import Label
from pdserve.tiers.spec import TierSpec
from pdserve.tiers.store import TierStore
from pdserve.transfer.memory import HostMemory
from tests.flows.inproc import NodeSpec, open_cluster

MIB = 2**20
TOTAL = 256 * MIB
BLOCK_SIZES = {
    "64 KiB": 64 * 1024,
    "96 KiB (demo model)": 96 * 1024,
    "256 KiB": 256 * 1024,
    "1 MiB": MIB,
    "2 MiB": 2 * MIB,
}
READ_CHUNK = MIB
IDENTITY = bytes(32)


def layout_of(block_bytes: int) -> KVLayout:
    group = KVGroup(num_layers=1, num_kv_heads=1, head_dim=block_bytes // (2 * 16 * 4), dtype="float32")
    return KVLayout(group=group, block_size=16, num_blocks=TOTAL // block_bytes, model_revision="benchmark")


def names(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


class Bench:
    """A KV memory, a host tier that holds all of its blocks, and a file that does."""

    def __init__(self, folder: Path, block_bytes: int) -> None:
        self.layout = layout_of(block_bytes)
        self.total = self.layout.total_bytes
        self.memory = HostMemory(self.total)
        rng = np.random.default_rng(0)
        self.memory.array[:] = rng.integers(0, 256, self.total, dtype=np.uint8)
        self.device = device_blocks(self.memory, self.layout)
        self.hashes = names(self.layout.num_blocks)
        self.host = self._store(HostTier(self.layout.num_blocks, block_bytes), None)
        self.host.save(list(zip(self.hashes, range(self.layout.num_blocks), strict=True)), ())
        self.disk_tier = DiskTier.open(
            folder,
            name="bench",
            size=self.total + self.layout.num_blocks * 4200 + 65536,
            block_bytes=block_bytes,
            identity=IDENTITY,
        )
        self._fill_disk()
        self.disk = self._store(HostTier(1, block_bytes), self.disk_tier)
        self.path = folder / "bench" / "blocks"
        self.source = self.memory.array.copy()

    def _store(self, host: HostTier, disk: DiskTier | None) -> TierStore:
        return TierStore(self.device, host, disk, IDENTITY)

    def _fill_disk(self) -> None:
        """In the order of the chain, as one prompt after the other leaves the host tier."""
        for block, block_hash in enumerate(self.hashes):
            [source] = self.host.pin([block_hash])
            reserved = self.disk_tier.reserve(block_hash, source.checksum)
            assert reserved
            self.disk_tier.file.write(
                Label(reserved[0].slot, block + 1, block_hash, source.checksum), self.host.host_rows[source.slot]
            )
            self.disk_tier.put(reserved[0])
            self.host.release([source])

    def spoil(self) -> None:
        """So that only what was restored can be right."""
        self.memory.array[::4096] ^= 1

    def restore(self, store: TierStore) -> None:
        count, _ = Restorer(store, self.device).restore(self.hashes, range(self.layout.num_blocks))
        assert count == self.layout.num_blocks

    def memcpy(self) -> None:
        for at in range(0, self.total, READ_CHUNK):
            self.memory.array[at : at + READ_CHUNK] = self.source[at : at + READ_CHUNK]

    def read_file(self) -> None:
        with self.path.open("rb", buffering=0) as file:
            at, target = 0, self.memory.array.data
            while count := file.readinto(target[at : at + READ_CHUNK]):
                at = (at + count) % (self.total - READ_CHUNK)

    def drop_pages(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def close(self) -> None:
        self.host.close(1)
        self.disk.close(1)
        self.memory.close()


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def speed(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    return [{"block": label, **_speed(folder / str(size), size, repetitions)} for label, size in BLOCK_SIZES.items()]


def _speed(folder: Path, block_bytes: int, repetitions: int) -> dict[str, Any]:
    bench = Bench(folder, block_bytes)
    seconds: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):
        runs: list[tuple[str, Callable[[], None], bool]] = [
            ("memcpy", bench.memcpy, False),
            ("host restore", lambda: bench.restore(bench.host), False),
            ("warm read", bench.read_file, False),
            ("warm restore", lambda: bench.restore(bench.disk), False),
            ("cold read", bench.read_file, True),
            ("cold restore", lambda: bench.restore(bench.disk), True),
        ]
        for name, work, cold in runs:
            bench.spoil()
            if cold:
                bench.drop_pages()
            taken = timed(work)
            if repetition:
                seconds.setdefault(name, []).append(taken)
    bench.close()
    rates = {name: round(bench.total / statistics.median(values) / 1e9, 2) for name, values in seconds.items()}
    pairs = (("host restore", "memcpy"), ("warm restore", "warm read"), ("cold restore", "cold read"))
    return {
        "gb_per_second": rates,
        "share": {
            mine: round(statistics.median(b / a for a, b in zip(seconds[mine], seconds[plain], strict=True)), 2)
            for mine, plain in pairs
        },
    }


BLOCK_SIZE, CONVERSATIONS, TURNS, QUESTION, OUTPUT = 16, 10, 5, 160, 16
WORKING_SET = CONVERSATIONS * TURNS * (QUESTION + OUTPUT) // BLOCK_SIZE
POOL = max(WORKING_SET // 10, TURNS * (QUESTION + OUTPUT) // BLOCK_SIZE + 1)


async def conversations(folder: Path) -> dict[str, Any]:
    """The same conversations without tiers, with host memory for a third, and with the rest on disk."""
    block_bytes = 96 * 1024
    third = WORKING_SET // 3 * block_bytes
    cases = {
        "no tiers": None,
        "host": TierSpec(host_bytes=third),
        "host and disk": TierSpec(host_bytes=third, disk_path=folder, disk_bytes=2 * WORKING_SET * block_bytes),
        "host for all": TierSpec(host_bytes=WORKING_SET * block_bytes),
    }
    told = {name: await _talk(tiers) for name, tiers in cases.items()}
    answers = [result.pop("answers") for result in told.values()]
    assert all(one == answers[0] for one in answers), "tiers changed an answer"
    return {"working_set_blocks": WORKING_SET, "pool_blocks": POOL, "same_answers": True, "cases": told}


async def _talk(tiers: TierSpec | None) -> dict[str, Any]:
    limits = EngineLimits(max_tokens_per_step=256, chunk_size=256, max_model_len=POOL * BLOCK_SIZE)
    node = NodeSpec(role=Role.UNIFIED, limits=limits, num_blocks=POOL, block_size=BLOCK_SIZE, tiers=tiers)
    sampling = SamplingParams(temperature=0, seed=1, max_tokens=OUTPUT, ignore_eos=True)
    histories: list[list[int]] = [[] for _ in range(CONVERSATIONS)]
    first_tokens, cached, asked, answers = [], 0, 0, []
    async with open_cluster(Config().model_path, {"u": node}) as cluster:
        for turn in range(TURNS):
            for number, history in enumerate(histories):
                history += Random(1000 * number + turn).choices(range(3, 4000), k=QUESTION)
                answer = await cluster.answer(history, sampling)
                history += answer.token_ids
                answers.append(answer.token_ids)
                trace = answer.record.prompt_trace
                assert trace
                if turn:
                    stamps = dict(trace.stamps)
                    first_tokens.append(stamps["first_token"] - stamps["queued"])
                    cached += trace.cached_tokens
                    asked += len(history) - QUESTION - OUTPUT
        tallies = cluster.engines["u"].snapshot().tiers
    return {
        "answers": answers,
        "ttft_ms_p50": round(1000 * statistics.median(first_tokens), 1),
        "ttft_ms_p90": round(1000 * statistics.quantiles(first_tokens, n=10)[-1], 1),
        "history_hit_rate": round(cached / asked, 3),
        "history_hit_rate_by_tier": {t.tier: round(t.restored_blocks * BLOCK_SIZE / asked, 3) for t in tallies},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "conversations"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load_before": os.getloadavg()[0]},
    }
    with TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.only != "conversations":
            result["speed"] = speed(Path(name), arguments.repetitions)
        if arguments.only != "speed":
            result["conversations"] = asyncio.run(conversations(Path(name)))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
