"""Residual add and RMSNorm in Triton: one program per row, so a row's bits never depend on the others."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
"""A row is held in the registers of one program."""


@triton.jit
def add_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x, delta, normed [rows, width], contiguous; weight [width]. x is overwritten where there is a delta."""
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + start + column, mask=inside, other=0).to(tl.float32)
    dtype = normed_ptr.dtype.element_ty
    if HAS_DELTA:
        total = (x + tl.load(delta_ptr + start + column, mask=inside, other=0).to(tl.float32)).to(dtype)
        tl.store(x_ptr + start + column, total, mask=inside)
        x = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    tl.store(normed_ptr + start + column, (x * scale).to(dtype).to(tl.float32) * weight, mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The norm of x + delta; x is overwritten with that sum. x, delta (rows, width), weight (width,), one dtype.

    Raises ValueError for rows wider than MAX_WIDTH or tensors that are not contiguous.
    """
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} elements do not fit one program; {MAX_WIDTH} do")
    if not x.is_contiguous() or (delta is not None and not delta.is_contiguous()):
        raise ValueError("x and delta must be contiguous")
    normed = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(width)
        add_norm_kernel[(rows,)](
            x,
            x if delta is None else delta,
            weight,
            normed,
            width,
            eps,
            HAS_DELTA=delta is not None,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return normed


def num_warps(block: int) -> int:
    """16 bytes of bf16 per thread and load where the row is long enough."""
    return min(max(block // 256, 1), 16)
