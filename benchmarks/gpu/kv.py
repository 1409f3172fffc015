"""KV on one GPU, in one JSON: transfers between two processes, the digest, and the pinned host tier.

Every rate stands beside the plain copy of the same bytes in the same repetition: device to device for transfers and the
digest, pinned host memory to or from the device for the tier. Transfers are those of two workers of the demo model over
NIXL, verified and compared by digest afterwards. NCCL is not in it: it refuses two ranks on one GPU.

    python -m benchmarks.gpu.kv --out gpu_kv.json        (make bench-gpu-kv; about two minutes)

What was measured is in the file after each part, whatever happens to the next; of a part that fails, its error is.
With --device cpu the same code runs over torch's host memory, to try it without a GPU.
"""

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pdserve
from pdserve.core.endpoint import new_epoch
from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.core.protocols import PullSpec
from pdserve.tiers.arena import allocate_rows
from pdserve.tiers.device import device_blocks
from pdserve.tiers.host import HostTier
from pdserve.tiers.restore import Restorer
from pdserve.tiers.store import TierStore
from pdserve.transfer.memory import TensorMemory
from pdserve.worker.service import WorkerHandle, WorkerSpec, open_worker
from pdserve_kernels.kv_digest import reference

MIB = 2**20
MODEL = Path(pdserve.__file__).parent / "assets" / "demo"
BLOCK_TOKENS = (16, 64, 256)
"""48, 192 and 768 KiB of the demo model's KV in bfloat16."""
TIER_BLOCKS = (96 * 1024, 256 * 1024, MIB, 2 * MIB)
SEED = 5
DEADLINE = 30.0


class Machine:
    """The device, and waiting for it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"

    def facts(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else platform.processor()
        return {"device": name, "torch": torch.__version__, "platform": platform.platform()}

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def compared(num_bytes: int, runs: dict[str, list[float]], plain: dict[str, str]) -> dict[str, Any]:
    """Median rates in GB/s, and each run's share of its plain operation in the same repetition."""
    return {
        "gb_per_second": {name: round(num_bytes / statistics.median(times) / 1e9, 2) for name, times in runs.items()},
        "share": {
            name: round(statistics.median(b / a for a, b in zip(runs[name], runs[base], strict=True)), 3)
            for name, base in plain.items()
        },
    }


async def transfers(machine: Machine, block_tokens: int, total: int, repetitions: int) -> dict[str, Any]:
    """Whole pools, from one worker process to another, blocks in another order and memory order there."""
    spec = WorkerSpec(
        model=MODEL,
        engine_id="p",
        epoch=new_epoch(),
        num_blocks=8,
        block_size=block_tokens,
        device=str(machine.device),
        dtype="bfloat16",
        backends=("nixl",),
    )
    block_bytes = 3072 * block_tokens
    spec = replace(spec, num_blocks=max(8, total // block_bytes))
    source = await open_worker(spec, "process")
    try:
        other = replace(spec, engine_id="d", epoch=new_epoch(), order=KVOrder.LAYER_MAJOR)
        target = await open_worker(other, "process")
        try:
            return await _pulls(machine, source, target, spec, repetitions)
        finally:
            await target.close()
    finally:
        await source.close()


async def _pulls(
    machine: Machine, source: WorkerHandle, target: WorkerHandle, spec: WorkerSpec, repetitions: int
) -> dict[str, Any]:
    blocks = tuple(range(spec.num_blocks))
    targets = tuple(int(block) for block in np.random.default_rng(0).permutation(spec.num_blocks))
    num_bytes = source.layout.block_bytes * len(blocks)
    await source.transfer.connect(target.transfer.address)
    await target.transfer.connect(source.transfer.address)
    mine, theirs = (torch.zeros(num_bytes, dtype=torch.uint8, device=machine.device) for _ in range(2))
    runs: dict[str, list[float]] = {"copy": [], "wire": [], "pull, verified": []}
    for repetition in range(repetitions + 1):
        await source.transfer.fill(blocks, repetition)
        tokens = len(blocks) * spec.block_size
        digest = await source.transfer.digest(blocks, tokens, SEED)
        pull = PullSpec(
            peer="p",
            epoch=spec.epoch,
            source_blocks=blocks,
            target_blocks=targets,
            digest=digest,
            seed=SEED,
            deadline=DEADLINE,
            start_within=DEADLINE,
        )
        copied = machine.seconds(lambda: mine.copy_(theirs))
        began = time.perf_counter()
        receipt = await target.transfer.pull(pull).wait()
        taken = time.perf_counter() - began
        if await target.transfer.digest(targets, tokens, SEED) != digest:
            raise RuntimeError("the target's bytes are not the source's")
        if repetition:
            for name, seconds in (("copy", copied), ("wire", receipt.wire_seconds), ("pull, verified", taken)):
                runs[name].append(max(seconds, 1e-9))
    plain = {"wire": "copy", "pull, verified": "copy"}
    return {"block_bytes": source.layout.block_bytes, "bytes": num_bytes, **compared(num_bytes, runs, plain)}


def digests(machine: Machine, total: int, repetitions: int) -> dict[str, Any]:
    """The keyed sum where the bytes lie: the kernel on a GPU, NumPy's reference elsewhere."""
    memory = torch.randint(0, 256, (total,), dtype=torch.uint8, device=machine.device)
    copy = torch.empty_like(memory)
    offsets = np.arange(0, total, 256 * 1024, dtype=np.uint64)
    lengths = np.full(len(offsets), 256 * 1024, dtype=np.uint64)

    def digest() -> bytes:
        if machine.is_gpu:
            from pdserve_kernels.kv_digest import kernel

            return kernel.keyed_sum(memory, offsets, lengths, SEED)
        return reference.keyed_sum([memory.numpy()], SEED)

    runs: dict[str, list[float]] = {"copy": [], "digest": []}
    for repetition in range(repetitions + 1):
        times = machine.seconds(lambda: copy.copy_(memory)), machine.seconds(digest)
        if repetition:
            runs["copy"].append(times[0])
            runs["digest"].append(times[1])
    return {"bytes": total, **compared(total, runs, {"digest": "copy"})}


def tier(machine: Machine, block_bytes: int, total: int, repetitions: int) -> dict[str, Any]:
    """Save to and restore from the host tier, every block verified; plain are whole copies of pinned memory."""
    group = KVGroup(num_layers=1, num_kv_heads=1, head_dim=block_bytes // 128, dtype="float32")
    layout = KVLayout(group=group, block_size=16, num_blocks=total // block_bytes, model_revision="benchmark")
    num_bytes = layout.total_bytes
    memory = TensorMemory(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=machine.device))
    blocks = device_blocks(memory, layout)
    names = [number.to_bytes(16, "big") for number in range(layout.num_blocks)]
    host = torch.from_numpy(allocate_rows(1, num_bytes, gpu=blocks.gpu)[0])
    original = memory.tensor.clone()
    runs: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):
        store = TierStore(blocks, HostTier(layout.num_blocks, block_bytes, gpu=blocks.gpu), None, bytes(32))
        restorer = Restorer(store, blocks)
        saved = list(zip(names, range(layout.num_blocks), strict=True))
        works: dict[str, Callable[[], object]] = {
            "copy out": lambda: host.copy_(memory.tensor, non_blocking=True),
            "save": lambda store=store, saved=saved: store.save(saved, ()),  # type: ignore[misc]
            "copy in": lambda: memory.tensor.copy_(host, non_blocking=True),
            "restore": lambda restorer=restorer: restorer.restore(names, range(layout.num_blocks)),  # type: ignore[misc]
        }
        for name, work in works.items():
            if name == "restore":
                memory.tensor.zero_()
            seconds = machine.seconds(work)
            if repetition:
                runs.setdefault(name, []).append(seconds)
        if not torch.equal(memory.tensor, original):
            raise RuntimeError("what was restored is not what was saved")
    plain = {"save": "copy out", "restore": "copy in"}
    return {"block_bytes": block_bytes, "bytes": num_bytes, **compared(num_bytes, runs, plain)}


def measure(
    device: str,
    total: int,
    repetitions: int,
    block_tokens: tuple[int, ...] = BLOCK_TOKENS,
    tell: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All parts; tell is called with what there is after each. A part that fails leaves its error in its place."""
    machine = Machine(device)
    result: dict[str, Any] = {
        "machine": machine.facts(),
        "nccl": "not measured: NCCL refuses two ranks on one GPU (tests/gpu/test_nccl.py); its protocol is gloo's",
    }
    parts: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("digest", lambda: digests(machine, total, repetitions)),
        *(("host_tier", partial(tier, machine, block_bytes, total, repetitions)) for block_bytes in TIER_BLOCKS),
        *(
            ("nixl_between_processes", partial(_transfers, machine, tokens, total, repetitions))
            for tokens in block_tokens
        ),
    ]
    for name, part in parts:
        try:
            measured = part()
        except Exception as error:
            measured = {"error": f"{type(error).__name__}: {error}"[:300]}
        result.setdefault(name, []).append(measured)
        tell(result)
    return result


def _transfers(machine: Machine, block_tokens: int, total: int, repetitions: int) -> dict[str, Any]:
    return asyncio.run(transfers(machine, block_tokens, total, repetitions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mib", type=int, default=512, help="bytes per measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    def keep(result: dict[str, Any]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = measure(arguments.device, arguments.mib * MIB, arguments.repetitions, tell=keep)
    print(json.dumps(result, indent=1))
    errors = [
        part["error"] for parts in result.values() if isinstance(parts, list) for part in parts if "error" in part
    ]
    if errors:
        raise SystemExit(f"not all was measured: {errors[0]}")


if __name__ == "__main__":
    main()
