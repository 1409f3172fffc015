"""The kernels around attention against their roofline, and against the torch operations they stand for.

    PYTHONPATH=.:kernels python -m benchmarks.gpu.ops [--out FILE]

Ceilings are measured in the same run. `roofline` is the time the ceilings allow over the time taken.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.gpu.timing import DEVICE, copy_bytes_per_second, device_seconds, num_sets, product_operations_per_second
from pdserve_kernels.fused_norm.kernel import add_norm
from pdserve_kernels.rope_kv_write.kernel import HeadNorms, rope_kv_write
from pdserve_kernels.sampling.kernel import sample
from pdserve_kernels.sampling.scores import CONTROLS
from pdserve_kernels.silu_mul.kernel import silu_mul
from pdserve_kernels.small_gemm.kernel import Workspace, small_gemm

BF16 = torch.bfloat16
DECODE_ROWS = (1, 8, 32, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a model's layers."""

    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    dim: int = 128

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


MODELS = {
    "Llama-3.1-8B": Model(hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256),
    "Qwen3-0.6B": Model(hidden=1024, heads=16, kv_heads=8, mlp=3072, vocab=151936),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """bytes and operations of a launch; prepare makes a set of data, and of it a launch and, if there is one, what
    torch would launch instead."""

    name: str
    rows: int
    bytes: int
    operations: int
    prepare: Callable[[], tuple[Callable[[], object], Callable[[], object] | None]]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).mul_(scale).to(BF16)


def norm_case(width: int, rows: int) -> Case:
    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        x, delta, weight = normal(rows, width), normal(rows, width, scale=1e-4), normal(width)
        return lambda: add_norm(x, delta, weight, 1e-6), lambda: rms_norm(x + delta, (width,), weight, 1e-6)

    return Case(name="fused_norm", rows=rows, bytes=8 * rows * width, operations=6 * rows * width, prepare=prepare)


def silu_case(width: int, rows: int) -> Case:
    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        gate_up = normal(rows, 2 * width)
        return lambda: silu_mul(gate_up), lambda: silu(gate_up[:, :width]) * gate_up[:, width:]

    return Case(name="silu_mul", rows=rows, bytes=6 * rows * width, operations=6 * rows * width, prepare=prepare)


def rope_case(model: Model, rows: int, *, norms: bool) -> Case:
    size = rows * model.qkv

    def prepare() -> tuple[Callable[[], object], None]:
        qkv = normal(rows, model.heads + 2 * model.kv_heads, model.dim)
        blocks = -(-rows // 16) + 8
        kv = torch.zeros(blocks, 2, model.kv_heads, 16, model.dim, dtype=BF16, device=DEVICE)
        slots = torch.randperm(blocks * 16, device=DEVICE)[:rows]
        positions = torch.randint(4096, (rows,), device=DEVICE)
        angles = torch.randn(4096, model.dim // 2, device=DEVICE)
        weights = HeadNorms(query=normal(model.dim), key=normal(model.dim), eps=1e-6) if norms else None
        table = angles.cos(), angles.sin()
        return lambda: rope_kv_write(qkv, positions, slots, table, kv, weights), None

    name = "rope_kv_write with norms" if norms else "rope_kv_write"
    return Case(name=name, rows=rows, bytes=4 * size, operations=10 * size, prepare=prepare)


def sampling_case(vocab: int, rows: int, *, top_p: float, top_k: int) -> Case:
    def prepare() -> tuple[Callable[[], object], None]:
        logits = torch.randn(rows, vocab, device=DEVICE) * 3
        knobs = torch.tensor([[0.8, 1, 0, 0, top_p, 0]] * rows, device=DEVICE)
        controls = torch.zeros(rows, CONTROLS, dtype=torch.int64, device=DEVICE)
        controls[:, 0], controls[:, 2], controls[:, 3] = torch.arange(rows, device=DEVICE), top_k, -1
        return lambda: sample(logits, knobs, controls), None

    name = f"sampling, top_p {top_p}, top_k {top_k}"
    return Case(name=name, rows=rows, bytes=4 * rows * vocab, operations=60 * rows * vocab, prepare=prepare)


def product_cases(model: Model, rows: int, workspace: Workspace, *, deterministic: bool) -> Iterator[Case]:
    """The four products of a layer and the head, each with what it takes along."""
    hidden, mlp = model.hidden, model.mlp
    yield _product("qkv", rows, model.qkv, hidden, workspace, deterministic, norm=True)
    yield _product("output", rows, hidden, model.heads * model.dim, workspace, deterministic, residual=True)
    yield _product("gate_up", rows, mlp, hidden, workspace, deterministic, norm=True, gated=True)
    yield _product("down", rows, hidden, mlp, workspace, deterministic, residual=True)
    yield _product("head", rows, model.vocab, hidden, workspace, deterministic)


def _product(
    name: str,
    rows: int,
    columns: int,
    depth: int,
    workspace: Workspace,
    deterministic: bool,
    *,
    norm: bool = False,
    gated: bool = False,
    residual: bool = False,
) -> Case:
    outputs = columns * (2 if gated else 1)

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        x, weight = normal(rows, depth), normal(outputs, depth, scale=depth**-0.5)
        factor, stream = normal(depth), normal(rows, columns)

        def kernel() -> Tensor:
            return small_gemm(
                x,
                weight,
                workspace,
                norm=(factor, 1e-6) if norm else None,
                gated=gated,
                residual=stream if residual else None,
                deterministic=deterministic,
            )

        def peer() -> Tensor:
            y = linear(rms_norm(x, (depth,), factor, 1e-6) if norm else x, weight)
            y = silu(y[:, :columns]) * y[:, columns:] if gated else y
            return stream + y if residual else y

        return kernel, peer

    moved = 2 * (outputs * depth + rows * (depth + columns * (2 if residual else 1)))
    kind = ", deterministic" if deterministic else ""
    operations = 2 * rows * outputs * depth
    return Case(name=f"small_gemm {name}{kind}", rows=rows, bytes=moved, operations=operations, prepare=prepare)


def cases(
    model: Model, decode_rows: tuple[int, ...] = DECODE_ROWS, prompt_rows: tuple[int, ...] = (4096,)
) -> Iterator[Case]:
    workspace = Workspace.on(DEVICE)
    for rows in (*decode_rows, *prompt_rows):
        yield norm_case(model.hidden, rows)
        yield silu_case(model.mlp, rows)
        yield rope_case(model, rows, norms=False)
        yield rope_case(model, rows, norms=True)
    for rows in decode_rows:
        yield from product_cases(model, rows, workspace, deterministic=False)
        for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 20), (0.9, 50)):
            yield sampling_case(model.vocab, rows, top_p=top_p, top_k=top_k)
    for rows in (decode_rows[0], decode_rows[-1]):
        yield from product_cases(model, rows, workspace, deterministic=True)


def measured(case: Case, bytes_per_second: float, operations_per_second: float) -> dict[str, Any]:
    sets = [case.prepare() for _ in range(num_sets(case.bytes))]
    taken = device_seconds([kernel for kernel, _ in sets])
    peers = [peer for _, peer in sets if peer is not None]
    floor = max(case.bytes / bytes_per_second, case.operations / operations_per_second)
    return {
        "kernel": case.name,
        "rows": case.rows,
        "microseconds": round(taken.median * 1e6, 2),
        "spread": round(taken.spread, 3),
        "copy_bandwidth": round(case.bytes / taken.median / bytes_per_second, 3),
        "roofline": round(floor / taken.median, 3),
        "torch_over_kernel": round(device_seconds(peers).median / taken.median, 2) if peers else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none")
    ceilings = copy_bytes_per_second(), product_operations_per_second()
    print(f"{torch.cuda.get_device_name()}: copy {ceilings[0] / 1e12:.2f} TB/s, bf16 {ceilings[1] / 1e12:.0f} TFLOP/s")
    table = []
    for name, model in MODELS.items():
        for case in cases(model):
            table.append({"model": name, **measured(case, *ceilings)})
            print(*table[-1].values(), sep="\t", flush=True)
    if out is not None:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        ceiling = {"copy_bytes_per_second": ceilings[0], "bf16_operations_per_second": ceilings[1]}
        out.write_text(json.dumps({**device, **ceiling, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
