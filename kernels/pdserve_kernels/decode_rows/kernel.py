"""A decode step's inputs from the table, and its tokens into the table, in Triton."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdserve_kernels.decode_rows import columns
from pdserve_kernels.sampling.scores import CONTROLS, KNOBS

ROWS = 64
"""Of one program."""
_KNOBS, _CONTROLS = tl.constexpr(KNOBS), tl.constexpr(CONTROLS)
_POSITION, _TOKEN, _STREAM = tl.constexpr(columns.POSITION), tl.constexpr(columns.TOKEN), tl.constexpr(columns.STREAM)
_TOP_K, _TEMPERATURE = tl.constexpr(columns.TOP_K), tl.constexpr(columns.TEMPERATURE)
_TOP_P, _MIN_P, _TABLE = tl.constexpr(columns.TOP_P), tl.constexpr(columns.MIN_P), tl.constexpr(columns.TABLE)


@triton.jit
def _number(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["size"])
def inputs_kernel(
    table_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kv_lens_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    knobs_ptr: tl.tensor,
    controls_ptr: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    block_size: tl.tensor,
    ROWS: tl.constexpr,
) -> None:
    """ROWS of the step's `size` rows; padding (-1 in order) has token and position 0, slot -1 and no KV."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = at < size
    row = tl.load(order_ptr + at, mask=there, other=-1)
    real = row >= 0
    cells = table_ptr + row * width
    position = tl.load(cells + _POSITION, mask=real, other=0)
    block = tl.load(cells + _TABLE + position // block_size, mask=real, other=0)
    tl.store(tokens_ptr + at, tl.load(cells + _TOKEN, mask=real, other=0), mask=there)
    tl.store(positions_ptr + at, position, mask=there)
    tl.store(slots_ptr + at, tl.where(real, block * block_size + position % block_size, -1), mask=there)
    tl.store(kv_lens_ptr + at, tl.where(real, position + 1, 0), mask=there)
    tl.store(table_rows_ptr + at, tl.maximum(row, 0), mask=there)
    knobs, controls = knobs_ptr + at * _KNOBS, controls_ptr + at * _CONTROLS
    zero, none = tl.zeros_like(position), tl.zeros((ROWS,), tl.float32)
    tl.store(knobs, _number(tl.load(cells + _TEMPERATURE, mask=real, other=0)), mask=there)
    tl.store(knobs + 1, none + 1, mask=there)
    tl.store(knobs + 2, none, mask=there)
    tl.store(knobs + 3, none, mask=there)
    tl.store(knobs + 4, _number(tl.load(cells + _TOP_P, mask=real, other=0)), mask=there)
    tl.store(knobs + 5, _number(tl.load(cells + _MIN_P, mask=real, other=0)), mask=there)
    tl.store(controls, tl.load(cells + _STREAM, mask=real, other=0), mask=there)
    tl.store(controls + 1, position + 1, mask=there)
    tl.store(controls + 2, tl.load(cells + _TOP_K, mask=real, other=0), mask=there)
    tl.store(controls + 3, zero - 1, mask=there)
    tl.store(controls + 4, zero, mask=there)
    tl.store(controls + 5, zero, mask=there)


@triton.jit(do_not_specialize=["size"])
def advance_kernel(
    table_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    MOVES: tl.constexpr,
) -> None:
    """Results of ROWS rows: out (2, size) float64 is the token, -1 where the peak of its logits is no number, and its
    logprob."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = at < size
    row = tl.load(order_ptr + at, mask=there, other=-1)
    token = tl.load(tokens_ptr + at, mask=there, other=0)
    peak = tl.load(peaks_ptr + at, mask=there, other=0).to(tl.float32)
    usable = tl.abs(peak) < float("inf")  # false for NaN
    tl.store(out_ptr + at, tl.where(usable, token, -1).to(tl.float64), mask=there)
    tl.store(out_ptr + size + at, tl.load(logprobs_ptr + at, mask=there, other=0).to(tl.float64), mask=there)
    cells, real = table_ptr + row * width, row >= 0
    tl.store(cells + _TOKEN, token, mask=real)
    if MOVES:
        position = tl.load(cells + _POSITION, mask=real, other=0)
        tl.store(cells + _POSITION, position + 1, mask=real)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """tokens, positions, slots, kv_lens, table_rows: (size,) int64. knobs and controls: those of the sampling kernel,
    (size, KNOBS) float32 and (size, CONTROLS) int64, for rows without penalties, masks or banned tokens."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    kv_lens: Tensor
    table_rows: Tensor
    knobs: Tensor
    controls: Tensor


def decode_inputs(table: Tensor, order: Tensor, block_size: int) -> DecodeInputs:
    """The inputs of a step of one token for each row that order (size,) int64 names, -1 for padding.

    table (rows, width) int64, contiguous."""
    size, device = len(order), table.device
    # An even width: every row begins at a multiple of 16 bytes, and kernels need no other code for odd sizes.
    integers = torch.empty(5, size + size % 2, dtype=torch.int64, device=device)[:, :size]
    inputs = DecodeInputs(
        tokens=integers[0],
        positions=integers[1],
        slots=integers[2],
        kv_lens=integers[3],
        table_rows=integers[4],
        knobs=torch.empty(size, KNOBS, dtype=torch.float32, device=device),
        controls=torch.empty(size, CONTROLS, dtype=torch.int64, device=device),
    )
    inputs_kernel[(triton.cdiv(size, ROWS),)](
        table,
        order,
        inputs.tokens,
        inputs.positions,
        inputs.slots,
        inputs.kv_lens,
        inputs.table_rows,
        inputs.knobs,
        inputs.controls,
        size,
        table.shape[1],
        block_size,
        ROWS=ROWS,
    )
    return inputs


def advance(table: Tensor, order: Tensor, tokens: Tensor, logprobs: Tensor, peaks: Tensor, *, moves: bool) -> Tensor:
    """Write sampled tokens to their rows and, when the step moves, count their positions on; (2, size) float64: tokens,
    -1 where the highest logit, peaks (size,), is no number, and logprobs."""
    out = torch.empty(2, len(order), dtype=torch.float64, device=table.device)
    if len(order):
        advance_kernel[(triton.cdiv(len(order), ROWS),)](
            table, order, tokens, logprobs, peaks, out, len(order), table.shape[1], ROWS=ROWS, MOVES=moves
        )
    return out
