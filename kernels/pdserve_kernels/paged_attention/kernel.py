"""Paged attention in Triton: one kernel for decode, chunked prefill and what lies between; tuning.py sizes it.

Its two numbers, for one layer with H query heads, G KV heads and head_dim D in b bytes each:

* operations: 4 · H · D · pairs, with pairs = Σ over new tokens of the KV indices they see
* bytes: 2 · G · D · b · Σ kv_len, each key and value once, and 2 · H · D · b per new token for q and the result

Predicted on an H200 (4.3 TB/s, 790 TFLOP/s) for H = 32, G = 8, D = 128 in bf16, by the larger of the two::

    decode    64 sequences of 4096     4.3 GFLOP   1.07 GB     250 µs (bandwidth)
    decode    1 sequence of 32768      0.5 GFLOP    134 MB      31 µs (bandwidth)
    prefill   8192 tokens at once      550 GFLOP    168 MB     696 µs (compute)
    prefill   2048 after 30720         1.07 TFLOP   168 MB    1.35 ms (compute)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdserve_kernels.paged_attention.tuning import Tuning, padded
from pdserve_kernels.paged_attention.work_list import ITEM_FIELDS, WorkList

LOG2_E = 1.4426950408889634
_FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def _kv_tile(
    base: tl.tensor,
    offsets: tl.tensor,
    inside: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """[KV_TILE, DIM] keys or values; zero outside, whatever lies there: 0 * NaN is NaN."""
    dim = tl.arange(0, DIM)
    pointers = base + (offsets[:, None] + dim[None, :])
    if MASKED:
        return tl.load(pointers, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < DIM:
        return tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend(
    q: tl.tensor,
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    kv_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    stride_block: tl.tensor,
    stride_kv: tl.tensor,
    stride_slot: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Take the KV tile at first into a state. MASKED: part of it lies at or beyond end, or after a row's position."""
    index = first + tl.arange(0, KV_TILE)
    inside = index < end
    if BLOCK_SIZE % KV_TILE == 0:
        block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
        base = kv_ptr + block * stride_block
        offsets = (index % BLOCK_SIZE) * stride_slot
    else:
        if MASKED:
            blocks = tl.load(table_ptr + index // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            blocks = tl.load(table_ptr + index // BLOCK_SIZE).to(tl.int64)
        base = kv_ptr
        offsets = blocks * stride_block + (index % BLOCK_SIZE) * stride_slot
    keys = _kv_tile(base, offsets, inside, MASKED, HEAD_DIM, DIM)
    values = _kv_tile(base + stride_kv, offsets, inside, MASKED, HEAD_DIM, DIM)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where(index[None, :] <= positions[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet has no peak to subtract. Every fused multiply-add is written out: left to the
    # compiler, a row's bits would depend on whether its tile happened to be masked.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    fade = tl.exp2(peak - shift)
    total = tl.fma(total, fade, tl.sum(weights, 1))
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def _fold(
    accs_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    first_slot: tl.tensor,
    parts: tl.tensor,
    out_base: tl.tensor,
    out_offsets: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    ROWS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    FOLD: tl.constexpr,
    FOLD_DIM: tl.constexpr,
) -> None:
    """Write the result of a unit whose parts are all there, folded in their order.

    FOLD states are loaded side by side, FOLD_DIM columns at a time: latency against registers.
    """
    rows = tl.arange(0, ROWS)
    for column in range(0, DIM, FOLD_DIM):
        dim = column + tl.arange(0, FOLD_DIM)
        within = (dim < HEAD_DIM)[None, :]
        acc = tl.zeros((ROWS, FOLD_DIM), dtype=tl.float32)
        peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, parts, FOLD):
            for ahead in tl.static_range(FOLD):
                part = first + ahead
                there = token < tl.where(parts > part, tokens, 0)
                state = (first_slot + part).to(tl.int64) * QUERY_ROWS
                # Past the first-level cache, which does not see what other multiprocessors wrote.
                peak_of = tl.load(peaks_ptr + state + rows, mask=there, other=float("-inf"), cache_modifier=".cg")
                total_of = tl.load(totals_ptr + state + rows, mask=there, other=0.0, cache_modifier=".cg")
                acc_of = tl.load(
                    accs_ptr + state * HEAD_DIM + (rows[:, None] * HEAD_DIM + dim[None, :]),
                    mask=there[:, None] & within,
                    other=0.0,
                    cache_modifier=".cg",
                )
                new_peak = tl.maximum(peak, peak_of)
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                fade, weight = tl.exp2(peak - shift), tl.exp2(peak_of - shift)
                total = tl.fma(total_of, weight, total * fade)
                acc = tl.fma(acc_of, weight[:, None], acc * fade[:, None])
                peak = new_peak
        _write(out_base + (out_offsets[:, None] + dim[None, :]), acc, total, (token < tokens)[:, None] & within)


@triton.jit
def _write(pointers: tl.tensor, acc: tl.tensor, total: tl.tensor, mask: tl.tensor) -> None:
    """Results from a finished state; a row that has seen nothing is zero."""
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(pointers, result.to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table"])
def paged_attention_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    items_ptr: tl.tensor,
    program_starts_ptr: tl.tensor,
    accs_ptr: tl.tensor,
    peaks_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    scale: tl.tensor,
    stride_q_token: tl.tensor,
    stride_q_head: tl.tensor,
    stride_out_token: tl.tensor,
    stride_out_head: tl.tensor,
    stride_table: tl.tensor,
    stride_block: tl.tensor,
    stride_kv: tl.tensor,
    stride_head: tl.tensor,
    stride_slot: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KV_TILE: tl.constexpr,
    FOLD: tl.constexpr,
    FOLD_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One program computes its items of the work list. Strides are in elements; dim is contiguous everywhere.

    q, out (tokens, heads, HEAD_DIM); kv (blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM); tables (sequences, blocks).
    States of parts: accs (slots, QUERY_ROWS, HEAD_DIM), peaks and totals (slots, QUERY_ROWS) float32 and arrivals
    (slots,) int32, zero before and after, with QUERY_ROWS = ROWS // GROUP * GROUP. Row r of a tile is query head
    r % GROUP of token r // GROUP.
    """
    QUERY_ROWS: tl.constexpr = ROWS // GROUP * GROUP
    rows = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    within = (dim < HEAD_DIM)[None, :]
    token, head = rows // GROUP, rows % GROUP
    program = tl.program_id(0)
    first_item, end_item = tl.load(program_starts_ptr + program), tl.load(program_starts_ptr + program + 1)
    # What could be hoisted out of this loop would occupy registers through all others.
    for i in tl.range(first_item, end_item, disable_licm=True):
        item = items_ptr + i * _FIELDS
        sequence, first_row = tl.load(item), tl.load(item + 1)
        tokens, position = tl.load(item + 2), tl.load(item + 3)
        kv_head, kv_first, kv_end = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
        parts, first_slot, part = tl.load(item + 7), tl.load(item + 8), tl.load(item + 9)
        if parts > 0:
            valid = token < tokens
            there = valid[:, None] & within
            # 64 bits for where a tile begins, 32 within it: registers are what the compiler runs out of.
            first_head = (kv_head * GROUP).to(tl.int64)
            q_base = q_ptr + first_row.to(tl.int64) * stride_q_token + first_head * stride_q_head
            q_offsets = token * stride_q_token + head * stride_q_head
            q = tl.load(q_base + (q_offsets[:, None] + dim[None, :]), mask=there, other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
            positions = position + token
            kv_base = kv_ptr + kv_head.to(tl.int64) * stride_head
            table = tables_ptr + sequence.to(tl.int64) * stride_table
            acc = tl.zeros((ROWS, DIM), dtype=tl.float32)
            peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((ROWS,), dtype=tl.float32)
            # Tiles that every row sees whole need no mask.
            whole_end = tl.minimum(kv_end, (position + 1) // KV_TILE * KV_TILE)
            for first in range(kv_first, whole_end, KV_TILE):
                acc, peak, total = _attend(
                    q, acc, peak, total, kv_base, table, first, kv_end, positions, scale,
                    stride_block, stride_kv, stride_slot, False, HEAD_DIM, DIM, BLOCK_SIZE, KV_TILE, UPCAST,
                )  # fmt: skip
            for first in range(tl.maximum(kv_first, whole_end), kv_end, KV_TILE):
                acc, peak, total = _attend(
                    q, acc, peak, total, kv_base, table, first, kv_end, positions, scale,
                    stride_block, stride_kv, stride_slot, True, HEAD_DIM, DIM, BLOCK_SIZE, KV_TILE, UPCAST,
                )  # fmt: skip
            out_base = out_ptr + first_row.to(tl.int64) * stride_out_token + first_head * stride_out_head
            out_offsets = token * stride_out_token + head * stride_out_head
            if parts == 1:
                _write(out_base + (out_offsets[:, None] + dim[None, :]), acc, total, there)
            else:
                state = (first_slot + part).to(tl.int64) * QUERY_ROWS
                tl.store(accs_ptr + state * HEAD_DIM + (rows[:, None] * HEAD_DIM + dim[None, :]), acc, mask=there)
                tl.store(peaks_ptr + state + rows, peak, mask=valid)
                tl.store(totals_ptr + state + rows, total, mask=valid)
                # The barrier puts every thread's stores before the one thread's count, which releases them.
                tl.debug_barrier()
                if tl.atomic_add(arrivals_ptr + first_slot, 1) == parts - 1:
                    tl.store(arrivals_ptr + first_slot, 0)
                    _fold(
                        accs_ptr, peaks_ptr, totals_ptr, first_slot, parts, out_base, out_offsets, token, tokens,
                        ROWS, QUERY_ROWS, HEAD_DIM, DIM, FOLD, FOLD_DIM,
                    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Memory for the states of a launch's parts; serves any number of launches, one after the other."""

    accs: Tensor
    peaks: Tensor
    totals: Tensor
    arrivals: Tensor


def allocate_states(slots: int, query_rows: int, head_dim: int, device: torch.device) -> States:
    """query_rows: tokens of a query tile times query heads per KV head."""
    shape = (max(1, slots), query_rows)
    return States(
        accs=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        peaks=torch.empty(shape, dtype=torch.float32, device=device),
        totals=torch.empty(shape, dtype=torch.float32, device=device),
        arrivals=torch.zeros(shape[0], dtype=torch.int32, device=device),
    )


INTERPRETED = not isinstance(paged_attention_kernel, triton.runtime.JITFunction)
"""Triton's interpreter computes bfloat16 wrongly, so there everything is float32 once loaded."""


def paged_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    work: WorkList,
    states: States,
    out: Tensor,
    *,
    tuning: Tuning,
    scale: float | None = None,
) -> None:
    """Write the results of a work list's tokens to their rows of out; other rows stay as they are.

    q, out (rows, heads, head_dim); kv (blocks, 2, kv_heads, block_size, head_dim), one layer in any strides;
    block_tables (sequences, blocks), an integer type. The work must be cut with the same tuning. scale: of the
    scores, head_dim ** -0.5 by default. Raises ValueError when dim is not contiguous.
    """
    heads, head_dim = q.shape[1:]
    if q.stride(2) != 1 or kv.stride(4) != 1 or out.stride(2) != 1:
        raise ValueError("head_dim must be contiguous in q, kv and out")
    paged_attention_kernel[(len(work.program_starts) - 1,)](
        q,
        kv,
        out,
        block_tables,
        work.items,
        work.program_starts,
        states.accs,
        states.peaks,
        states.totals,
        states.arrivals,
        LOG2_E * (head_dim**-0.5 if scale is None else scale),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        *kv.stride()[:4],
        **constants(tuning, head_dim=head_dim, group=heads // kv.shape[2], block_size=kv.shape[3], upcast=INTERPRETED),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )


def constants(tuning: Tuning, *, head_dim: int, group: int, block_size: int, upcast: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for; upcast: everything is float32 once loaded."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "DIM": padded(head_dim),
        "BLOCK_SIZE": block_size,
        "ROWS": tuning.rows,
        "KV_TILE": tuning.kv_tile,
        "FOLD": tuning.fold,
        "FOLD_DIM": min(tuning.fold_dim, padded(head_dim)),
        "UPCAST": upcast,
    }
