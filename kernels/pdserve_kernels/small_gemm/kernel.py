"""Few-row products in Triton: split depth, norm, gate and residual in one launch."""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdserve_kernels.small_gemm.tiling import Tiling, tiling


@triton.jit(do_not_specialize=["rows"])
def small_gemm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    eps: tl.tensor,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """x [rows, depth], weight [columns or 2 * columns, depth], residual and out [rows, columns], all contiguous.

    Where SPLITS > 1: parts [SPLITS, rows, columns or 2 * columns] and squares [SPLITS, rows] float32 hold anything,
    arrived [tiles] int32 zeros, which it holds again afterwards. UPCAST computes in float32, for the interpreter.
    """
    column_tile, split, row_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    x_row = x_ptr + m.to(tl.int64)[:, None] * depth
    weight_row = weight_ptr + n.to(tl.int64)[None, :] * depth
    up_row = weight_row + columns.to(tl.int64) * depth
    for step in range(steps):
        k = (split * steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :], other=0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm_ptr + k, mask=k < depth, other=0).to(tl.float32)
            x = (wide * factor[None, :]).to(x_ptr.dtype.element_ty)
        inside = (k < depth)[:, None] & (n < columns)[None, :]
        acc = _dot(x, tl.load(weight_row + k[:, None], mask=inside, other=0), acc, UPCAST)
        if GATED:
            up = _dot(x, tl.load(up_row + k[:, None], mask=inside, other=0), up, UPCAST)

    last = True
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    if SPLITS > 1:
        width = columns * (2 if GATED else 1)
        part = parts_ptr + m.to(tl.int64)[:, None] * width + n[None, :]
        part_stride = rows.to(tl.int64) * width
        tl.store(part + split * part_stride, acc, mask=inside)
        if GATED:
            tl.store(part + split * part_stride + columns, up, mask=inside)
        if NORM:
            tl.store(squares_ptr + split * rows + m, squares, mask=m < rows)
        # All threads' parts are written before one of them tells: release, and acquire for who comes last.
        tl.debug_barrier()
        arrived = arrived_ptr + row_tile * tl.num_programs(0) + column_tile
        last = tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            squares = tl.zeros((BLOCK_M,), tl.float32)
            for other in range(SPLITS):
                acc += tl.load(part + other * part_stride, mask=inside, other=0, cache_modifier=".cg")
                if GATED:
                    up += tl.load(part + other * part_stride + columns, mask=inside, other=0, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(squares_ptr + other * rows + m, mask=m < rows, other=0, cache_modifier=".cg")
            tl.store(arrived, 0)
    if last:
        if NORM:
            scale = (1.0 / tl.sqrt(squares / depth + eps))[:, None]
            acc *= scale
            up *= scale
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=n < columns, other=0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_ptr + columns + n, mask=n < columns, other=0).to(tl.float32)[None, :]
        if GATED:
            acc = acc * tl.sigmoid(acc) * up
        at = m.to(tl.int64)[:, None] * columns + n[None, :]
        if RESIDUAL:
            acc += tl.load(residual_ptr + at, mask=inside, other=0).to(tl.float32)
        tl.store(out_ptr + at, acc, mask=inside)


@triton.jit
def _dot(x: tl.tensor, weight: tl.tensor, acc: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    if UPCAST:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, weight, acc, input_precision="ieee")


INTERPRETED = not isinstance(small_gemm_kernel, triton.JITFunction)
"""Arithmetic on bf16 is wrong in Triton's interpreter."""


@dataclass(slots=True)
class Workspace:
    """Memory the parts of a product meet in; grows as needed, at least to the double, and keeps what it outgrew: a
    graph's launches use the addresses they were captured with. For one stream at a time."""

    device: torch.device
    floats: Tensor
    counters: Tensor
    outgrown: list[Tensor] = field(default_factory=list)

    @classmethod
    def on(cls, device: torch.device) -> "Workspace":
        floats = torch.empty(0, dtype=torch.float32, device=device)
        return cls(device, floats, torch.zeros(0, dtype=torch.int32, device=device))

    def reserve(self, floats: int, counters: int) -> None:
        if self.floats.numel() < floats:
            self.outgrown.append(self.floats)
            self.floats = torch.empty(max(floats, 2 * self.floats.numel()), dtype=torch.float32, device=self.device)
        if self.counters.numel() < counters:
            self.outgrown.append(self.counters)
            size = max(counters, 2 * self.counters.numel())
            self.counters = torch.zeros(size, dtype=torch.int32, device=self.device)


def small_gemm(
    x: Tensor,
    weight: Tensor,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    deterministic: bool = False,
    cut: Tiling | None = None,
) -> Tensor:
    """x (rows, depth), weight (columns, depth) → (rows, columns), half as many when gated. norm: weight and epsilon.

    All of one dtype. residual (rows, columns) is added to the result. cut replaces the tiling chosen by shape.
    Raises ValueError for tensors that are not contiguous or do not fit.
    """
    rows, depth = x.shape
    columns = weight.shape[0] // (2 if gated else 1)
    if weight.shape[1] != depth or weight.shape[0] % (2 if gated else 1):
        raise ValueError(f"a weight of {tuple(weight.shape)} does not apply to rows of {depth}")
    if not (x.is_contiguous() and weight.is_contiguous() and (residual is None or residual.is_contiguous())):
        raise ValueError("x, weight and residual must be contiguous")
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    cut = cut or tiling(rows, columns, depth, gated=gated, deterministic=deterministic, element_size=x.element_size())
    grid = (triton.cdiv(columns, cut.block_n), cut.splits, triton.cdiv(rows, cut.block_m))
    num_parts = cut.splits * rows * weight.shape[0]
    if cut.splits > 1:
        workspace.reserve(num_parts + cut.splits * rows, grid[0] * grid[2])
    small_gemm_kernel[grid](
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm[0],
        x if residual is None else residual,
        out,
        workspace.floats,
        workspace.floats[num_parts:],
        workspace.counters,
        rows,
        columns,
        depth,
        0.0 if norm is None else norm[1],
        BIAS=bias is not None,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        SPLITS=cut.splits,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k,
        UPCAST=INTERPRETED,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
    )
    return out
