"""silu(gate) · up in Triton; elementwise, in float32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.tensor, TILE: tl.constexpr) -> None:
    """gate_up [rows, 2 * width], out [rows, width], contiguous; one program per row and tile."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """(rows, 2 * width), contiguous, gates first → (rows, width). Raises ValueError for an odd number of columns."""
    rows, columns = gate_up.shape
    if columns % 2 or not gate_up.is_contiguous():
        raise ValueError("gate_up must be contiguous, with as many gates as values")
    out = torch.empty(rows, columns // 2, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(columns // 2, TILE))](gate_up, out, columns // 2, TILE=TILE)
    return out
