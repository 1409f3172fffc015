"""The work list of a step of one new token per sequence: that of work_list.py, in one launch and closed form.

With one token each, every sequence is one tile, and every KV head has the same costs: a stretch of C tiles on the line.
So where an item begins, and how many items begin before it, follow from the running sums of one head's costs: nothing
is sorted. Balanced, an item begins with each unit and with each program's stretch::

    item of unit u that begins at a        u + number of stretches that begin at or before a
    item of the stretch that begins at x   its number + number of units that begin before x; empty if one begins at x

Operations: some hundred per item; bytes: 40 per item, and the lengths once per program. Bound by its launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdserve_kernels.paged_attention.work_list import ITEM_FIELDS, MAX_ITEMS, Cut, WorkList

ITEMS_PER_PROGRAM = 32
_FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def _below(ends: tl.tensor, x: tl.tensor) -> tl.tensor:
    """For each x, how many of ends are at most x."""
    return tl.sum((ends[None, :] <= x[:, None]).to(tl.int32), 1)


@triton.jit
def _picked(values: tl.tensor, index: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """values[index], as a sum of one term."""
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == index[:, None], values[None, :], 0), 1)


@triton.jit
def _write(
    items_ptr: tl.tensor,
    index: tl.tensor,
    table_row: tl.tensor,
    sequence: tl.tensor,
    kv_len: tl.tensor,
    head: tl.tensor,
    offset: tl.tensor,
    length: tl.tensor,
    parts: tl.tensor,
    first_slot: tl.tensor,
    part: tl.tensor,
    mask: tl.tensor,
    KV_TILE: tl.constexpr,
) -> None:
    """offset and length of the part in KV tiles of its unit."""
    item = items_ptr + index * _FIELDS
    one = tl.zeros_like(sequence) + 1
    tl.store(item, table_row, mask=mask)
    tl.store(item + 1, sequence, mask=mask)
    tl.store(item + 2, one, mask=mask)
    tl.store(item + 3, kv_len - 1, mask=mask)
    tl.store(item + 4, head, mask=mask)
    tl.store(item + 5, offset * KV_TILE, mask=mask)
    tl.store(item + 6, tl.minimum((offset + length) * KV_TILE, kv_len), mask=mask)
    tl.store(item + 7, parts, mask=mask)
    tl.store(item + 8, first_slot, mask=mask)
    tl.store(item + 9, part, mask=mask)


@triton.jit(do_not_specialize=["sequences", "num_items"])
def decode_list_kernel(
    table_rows_ptr: tl.tensor,
    kv_lens_ptr: tl.tensor,
    items_ptr: tl.tensor,
    program_starts_ptr: tl.tensor,
    sequences: tl.tensor,
    kv_heads: tl.tensor,
    programs: tl.tensor,
    num_items: tl.tensor,
    KV_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    N: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """The first half of the grid writes what begins with units (or with pieces of SPLIT tiles, if that is not 0), the
    second the stretches of the attention's programs. N: a power of two, at least `sequences`.
    """
    at = tl.arange(0, N)
    there = at < sequences
    lens = tl.load(kv_lens_ptr + at, mask=there, other=0).to(tl.int32)
    rows = tl.load(table_rows_ptr + at, mask=there, other=0).to(tl.int32)
    # Padding sees nothing and still writes its zeros.
    costs = tl.where(there, tl.maximum((lens + KV_TILE - 1) // KV_TILE, 1), 0)
    ends = tl.cumsum(costs, 0)
    starts = ends - costs
    head_cost = tl.sum(costs, 0)
    line_end = head_cost * kv_heads
    stretch = (line_end + programs - 1) // programs
    # Past the last sequence nothing ends: a search that finds none stops there.
    ends = tl.where(there, ends, line_end + 1)

    half = tl.num_programs(0) // 2
    program = tl.program_id(0)
    index = (program % half) * ITEMS + tl.arange(0, ITEMS)
    if SPLIT > 0:
        pieces = (costs + SPLIT - 1) // SPLIT
        piece_ends = tl.cumsum(pieces, 0)
        piece_starts = piece_ends - pieces
        head_pieces = tl.sum(pieces, 0)
        piece_ends = tl.where(there, piece_ends, head_pieces * kv_heads + 1)
        if program < half:
            head, inner = index // head_pieces, index % head_pieces
            sequence = _below(piece_ends, inner)
            part = inner - _picked(piece_starts, sequence, N)
            offset, cost = part * SPLIT, _picked(costs, sequence, N)
            length = tl.minimum(cost - offset, SPLIT)
            parts = tl.where(head < kv_heads, _picked(pieces, sequence, N), 0)
            table_row, kv_len = _picked(rows, sequence, N), _picked(lens, sequence, N)
            _write(
                items_ptr, index, table_row, sequence, kv_len, head, offset, length,
                parts, index - part, part, index < num_items, KV_TILE,
            )  # fmt: skip
        else:
            x = tl.minimum(index * stretch, line_end)
            head, inner = x // head_cost, x % head_cost
            sequence = _below(ends, inner)
            offset = inner - _picked(starts, sequence, N)
            begun = head * head_pieces + _picked(piece_starts, sequence, N) + (offset + SPLIT - 1) // SPLIT
            tl.store(program_starts_ptr + index, begun, mask=index <= programs)
    elif program < half:
        head, sequence = index // sequences, index % sequences
        begin, cost = head * head_cost + _picked(starts, sequence, N), _picked(costs, sequence, N)
        before = begin // stretch  # the last stretch that begins at or before the unit
        inside = (begin + cost - 1) // stretch - before
        length = tl.minimum((before + 1) * stretch - begin, cost)
        table_row, kv_len = _picked(rows, sequence, N), _picked(lens, sequence, N)
        _write(
            items_ptr, index + before + 1, table_row, sequence, kv_len, head, index * 0, length,
            inside + 1, 2 * before, index * 0, head < kv_heads, KV_TILE,
        )  # fmt: skip
    else:
        x = tl.minimum(index * stretch, line_end)
        head, inner = x // head_cost, x % head_cost
        sequence = _below(ends, inner)
        offset, cost = inner - _picked(starts, sequence, N), _picked(costs, sequence, N)
        units = head * sequences + sequence + (offset > 0).to(tl.int32)
        begin = x - offset
        before = begin // stretch
        parts = tl.where(offset > 0, (begin + cost - 1) // stretch - before + 1, 0)
        table_row, kv_len = _picked(rows, sequence, N), _picked(lens, sequence, N)
        _write(
            items_ptr, units + index, table_row, sequence, kv_len, head, offset, tl.minimum(stretch, cost - offset),
            parts, 2 * before, index - before, index < programs, KV_TILE,
        )  # fmt: skip
        tl.store(program_starts_ptr + index, units + index, mask=index <= programs)


def decode_work_list(cut: Cut, table_rows: Tensor, kv_lens: Tensor, longest: int) -> WorkList:
    """The balanced work list of one new token per sequence, or with a fixed split one of at most MAX_ITEMS parts, which
    lengths must not exceed. Fit for graph capture.

    table_rows, kv_lens: (sequences,) int64: where each sequence's block table is, and the tokens whose KV is there, the
    new one included; 0 is padding, whose result is zero. longest: the most there may be.
    """
    sequences = kv_lens.shape[0]
    units = sequences * cut.kv_heads
    if cut.split is None:
        items = units + cut.programs
    else:
        items = min(MAX_ITEMS, units * max(1, -(-longest // (cut.kv_tile * cut.split))))
    device = kv_lens.device
    list_items = torch.empty(items, ITEM_FIELDS, dtype=torch.int32, device=device)
    program_starts = torch.empty(cut.programs + 1, dtype=torch.int32, device=device)
    written = max(units if cut.split is None else items, cut.programs + 1)
    decode_list_kernel[(2 * triton.cdiv(written, ITEMS_PER_PROGRAM),)](
        table_rows,
        kv_lens,
        list_items,
        program_starts,
        sequences,
        cut.kv_heads,
        cut.programs,
        items,
        KV_TILE=cut.kv_tile,
        SPLIT=cut.split or 0,
        N=triton.next_power_of_2(sequences),
        ITEMS=ITEMS_PER_PROGRAM,
    )
    return WorkList(
        items=list_items, program_starts=program_starts, slots=2 * cut.programs if cut.split is None else items
    )
