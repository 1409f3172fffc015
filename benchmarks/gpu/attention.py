"""Paged attention against measured ceilings, at uniform and mixed lengths, and against torch's own attention.

    PYTHONPATH=.:kernels python -m benchmarks.gpu.attention [--out FILE]

One layer at a time, its KV out of reach of the L2 cache. `bandwidth` and `compute` are parts of the copy and product
ceilings measured in the same run; `torch_over_kernel` compares with SDPA, which finds keys and values contiguous,
padded to the longest sequence and masked to each one's length. `plan` is the time to build a step's work list.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.timing import (
    DEVICE,
    HAS_GPU,
    copy_bytes_per_second,
    device_seconds,
    num_sets,
    product_operations_per_second,
)
from pdserve_kernels.paged_attention.kernel import allocate_states, paged_attention
from pdserve_kernels.paged_attention.tuning import FIXED_SPLIT, Purpose, tuning_for
from pdserve_kernels.paged_attention.work_list import Cut, build_work_list, launches

DTYPE = torch.bfloat16
PEER_BYTES = 8 << 30
"""Padded keys and values of a peer may take so much, for it may copy them per query head and in float32; beyond, there
is no comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step of one layer; lens: (new tokens, tokens in all) of each sequence."""

    name: str
    purpose: Purpose
    lens: tuple[tuple[int, int], ...]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    block_major: bool = True

    @property
    def operations(self) -> int:
        pairs = sum(new * total - new * (new - 1) // 2 for new, total in self.lens)
        return 4 * self.heads * self.head_dim * pairs

    @property
    def bytes(self) -> int:
        kv = 2 * self.kv_heads * sum(total for _, total in self.lens)
        return self.head_dim * DTYPE.itemsize * (kv + 2 * self.heads * sum(new for new, _ in self.lens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    q: Tensor
    kv: Tensor
    tables: Tensor
    out: Tensor


def decode_cases() -> Iterator[Case]:
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for length in (1024, 8192):
            if batch * length <= 1 << 20:
                yield decode(f"decode {batch} x {length}", [length] * batch)
        # One sequence as long as all others together, and lengths that double: both keep the total of the uniform case.
        if batch > 1:
            short = 4096 // 2
            yield decode(f"decode {batch}, one long", [short * (batch - 1), *[short] * (batch - 1)])
            spread = np.exp2(np.linspace(0, 7, batch))
            yield decode(f"decode {batch}, spread 1:128", (spread / spread.mean() * 4096).astype(int).tolist())
    for block_major in (True, False):
        for block_size in (16, 64, 256):
            order = "block" if block_major else "layer"
            name = f"decode 64 x 4096, blocks of {block_size}, {order}-major"
            yield decode(name, [4096] * 64, block_size=block_size, block_major=block_major)
    yield decode("decode 64 x 4096, fixed split", [4096] * 64, purpose=Purpose.INVARIANT)


def decode(name: str, lengths: list[int], *, purpose: Purpose = Purpose.DECODE, **sizes: int | bool) -> Case:
    return Case(name=name, purpose=purpose, lens=tuple((1, length) for length in lengths), **sizes)  # type: ignore[arg-type]


def prefill_cases() -> Iterator[Case]:
    for head_dim, heads, kv_heads in ((64, 32, 8), (128, 32, 8), (256, 16, 2)):
        for new, total in ((2048, 2048), (8192, 8192), (16384, 16384), (2048, 32768), (256, 32768)):
            name = f"prefill {new} of {total}, dim {head_dim}"
            yield Case(
                name=name,
                purpose=Purpose.PREFILL,
                lens=((new, total),),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
            )
    ragged = ((4096, 4096), (100, 9000), (700, 700), (1500, 20000), (33, 33), (1763, 1763))
    yield Case(name="prefill, ragged 8192", purpose=Purpose.PREFILL, lens=ragged)
    yield Case(name="prefill 8192, fixed split", purpose=Purpose.INVARIANT, lens=((8192, 8192),))


def make_data(case: Case) -> Data:
    """KV in scattered blocks; block-major memory has two layers, which is enough to part neighbours."""
    counts = [-(-total // case.block_size) for _, total in case.lens]
    blocks = sum(counts)
    shape = (case.kv_heads, case.block_size, case.head_dim)
    if case.block_major:
        kv = torch.randn(blocks, 2, 2, *shape, dtype=DTYPE, device=DEVICE)[:, 1]
    else:
        kv = torch.randn(blocks, 2, *shape, dtype=DTYPE, device=DEVICE)
    permuted = torch.randperm(blocks, device=DEVICE)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int64, device=DEVICE)
    for row, count, end in zip(tables, counts, np.cumsum(counts), strict=True):
        row[:count] = permuted[end - count : end]
    q = torch.randn(sum(new for new, _ in case.lens), case.heads, case.head_dim, dtype=DTYPE, device=DEVICE)
    return Data(q=q, kv=kv, tables=tables, out=torch.empty_like(q))


def measured(case: Case, bytes_per_second: float, operations_per_second: float) -> dict[str, Any]:
    sets = [make_data(case) for _ in range(num_sets(case.bytes))]
    tuning = tuning_for(case.purpose, case.head_dim, case.heads // case.kv_heads, DTYPE.itemsize)
    group = case.heads // case.kv_heads
    cut = Cut(
        query_tile=tuning.rows // group,
        kv_tile=tuning.kv_tile,
        kv_heads=case.kv_heads,
        programs=multiprocessors() * tuning.programs,
        split=FIXED_SPLIT // tuning.kv_tile if case.purpose is Purpose.INVARIANT else None,
    )
    new, total = (np.array(lens) for lens in zip(*case.lens, strict=True))
    tensors = [torch.from_numpy(lens).to(DEVICE) for lens in (new.cumsum() - new, new, total)]
    planned = launches(cut, new, total)
    works = [build_work_list(cut, launch, *tensors) for launch in planned]
    states = allocate_states(max(work.slots for work in works), cut.query_tile * group, case.head_dim, sets[0].q.device)

    def attend(data: Data) -> None:
        for work in works:
            paged_attention(data.q, data.kv, data.tables, work, states, data.out, tuning=tuning)

    taken = device_seconds([lambda data=data: attend(data) for data in sets])  # type: ignore[misc]
    plan = device_seconds([lambda: [build_work_list(cut, launch, *tensors) for launch in planned]])
    floor = max(case.bytes / bytes_per_second, case.operations / operations_per_second)
    return {
        "case": case.name,
        "kv_megabytes": round(case.bytes / 1e6),
        "microseconds": round(taken.median * 1e6, 2),
        "spread": round(taken.spread, 3),
        "bandwidth": round(case.bytes / taken.median / bytes_per_second, 3),
        "teraflops": round(case.operations / taken.median / 1e12, 1),
        "compute": round(case.operations / taken.median / operations_per_second, 3),
        "roofline": round(floor / taken.median, 3),
        "plan_microseconds": round(plan.median * 1e6, 1),
        "torch_over_kernel": peer_ratio(case, taken.median),
    }


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if HAS_GPU else 4


def peer_ratio(case: Case, taken: float) -> float | None:
    """SDPA's time over the kernel's: for one sequence or equal decode lengths without a mask, else with one. None where
    it would need more memory than there is, or a mask of all pairs."""
    longest = max(total for _, total in case.lens)
    most = max(new for new, _ in case.lens)
    if 2 * len(case.lens) * longest * case.kv_heads * case.head_dim * DTYPE.itemsize > PEER_BYTES or most > longest:
        return None
    if most > 1 and (len(case.lens) > 1 or most < longest):
        return None  # ragged or after a prefix
    try:
        return round(_peer_seconds(case, most, longest) / taken, 2)
    except torch.OutOfMemoryError:
        return None


def _peer_seconds(case: Case, most: int, longest: int) -> float:
    batch = len(case.lens)
    q = torch.randn(batch, case.heads, most, case.head_dim, dtype=DTYPE, device=DEVICE)
    k, v = torch.randn(2, batch, case.kv_heads, longest, case.head_dim, dtype=DTYPE, device=DEVICE)
    lengths = torch.tensor([total for _, total in case.lens], device=DEVICE)
    mask = None
    if most == 1 and (lengths != longest).any():
        mask = (torch.arange(longest, device=DEVICE) < lengths[:, None])[:, None, None, :]
    return device_seconds(
        [lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=most > 1, enable_gqa=True)]
    ).median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none")
    ceilings = copy_bytes_per_second(), product_operations_per_second()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings[0] / 1e12:.2f} TB/s, bf16 {ceilings[1] / 1e12:.0f} TFLOP/s")
    table = []
    for case in (*decode_cases(), *prefill_cases()):
        if args.only in case.name:
            table.append(measured(case, *ceilings))
            print(*table[-1].values(), sep="\t", flush=True)
            torch.cuda.empty_cache()
    if args.out is not None:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        ceiling = {"copy_bytes_per_second": ceilings[0], "bf16_operations_per_second": ceilings[1]}
        args.out.write_text(json.dumps({**device, **ceiling, "attention": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
