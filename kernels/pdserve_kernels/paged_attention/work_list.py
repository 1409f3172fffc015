"""Which program attends to what in a step: lists of equal work whatever the lengths, made without a host sync.

The cost of a unit is its number of KV tiles. All units lie one after the other on a line of costs, heads outermost,
and each program gets an equal stretch of it::

    sequences      A: 9 tiles           B: 2  C: 5         (decode, one KV head)
    line           AAAAAAAAA            BB    CCCCC
    balanced       AAAA|AAAA|ABBC|CCCC                     4 programs, 4 tiles each; parts of A: 4 + 4 + 1
    fixed split 3  AAA|AAA AAA|BB|CCC CC                   cut at multiples of 3 of each unit's own tiles

Balanced, a sequence's parts depend on what else is in the step, and so does the rounding of its results. With a
fixed split they follow from KV indices alone: results are the same bits in any batch, at up to a split of imbalance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ITEM_FIELDS = 10
MAX_ITEMS = 8192
"""With a fixed split, a launch takes query tiles until it has so many parts to keep states of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How steps are cut: tokens per query tile and per KV tile, KV heads, programs; and every how many KV tiles a
    unit is cut in any case, or None to balance."""

    query_tile: int
    kv_tile: int
    kv_heads: int
    programs: int
    split: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one launch covers: query tiles [first_tile, first_tile + tiles) of a step; and room for that many items and
    states of parts."""

    first_tile: int
    tiles: int
    items: int
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkList:
    """items: (items, ITEM_FIELDS) int32: sequence, first row of q, tokens, KV index of the first token, KV head,
    first and end KV index of this part, number of parts (0: no work), slot of the unit's first part, this part.
    program_starts: (programs + 1,) int32, the items of program p are [program_starts[p], program_starts[p + 1]).
    slots: how many states of parts there may be.
    """

    items: Tensor
    program_starts: Tensor
    slots: int


def launches(cut: Cut, query_lens: NDArray[np.int64], kv_lens: NDArray[np.int64]) -> list[Launch]:
    """The launches that these lengths, known on the host, need: one, or with a fixed split as many as the bound on
    working memory demands. A sequence without new tokens takes no part."""
    tiles_of = -(-query_lens // cut.query_tile)
    tiles = int(tiles_of.sum())
    if not tiles:
        return []
    if cut.split is None:
        items = tiles * cut.kv_heads + cut.programs
        return [Launch(first_tile=0, tiles=tiles, items=items, slots=2 * cut.programs)]
    within = np.arange(tiles) - np.repeat(tiles_of.cumsum() - tiles_of, tiles_of)
    new, total = np.repeat(query_lens, tiles_of), np.repeat(kv_lens, tiles_of)
    kv_end = total - new + np.minimum((within + 1) * cut.query_tile, new)
    parts = cut.kv_heads * np.maximum(1, -(-kv_end // (cut.kv_tile * cut.split)))
    launch = (parts.cumsum() - parts) // MAX_ITEMS
    firsts = np.flatnonzero(np.diff(launch, prepend=-1))
    return [
        Launch(first_tile=int(first), tiles=len(mine), items=int(mine.sum()), slots=int(mine.sum()))
        for first, mine in zip(firsts, np.split(parts, firsts[1:]), strict=True)
    ]


def build_work_list(cut: Cut, launch: Launch, query_starts: Tensor, query_lens: Tensor, kv_lens: Tensor) -> WorkList:
    """The work of a launch, on the tensors' device, from shapes alone: fit for graph capture.

    query_starts, query_lens, kv_lens: (sequences,) int64: first row of q, new tokens (0: takes no part), tokens whose
    KV is there, the new ones included.
    """
    device = query_lens.device
    tiles_of = _ceil_div(query_lens, cut.query_tile)
    tile_ends = tiles_of.cumsum(0)
    tile = launch.first_tile + torch.arange(launch.tiles, device=device)
    sequence = torch.searchsorted(tile_ends, tile, right=True).clamp_(max=len(query_lens) - 1)
    first_token = (tile - (tile_ends - tiles_of)[sequence]) * cut.query_tile
    tokens = (query_lens[sequence] - first_token).clamp_(0, cut.query_tile)
    position = (kv_lens - query_lens)[sequence] + first_token
    kv_end = position + tokens

    # A tile that sees nothing (a padding row of a graph) still writes its zeros.
    cost = (_ceil_div(kv_end, cut.kv_tile).clamp_(min=1) * (tokens > 0)).repeat(cut.kv_heads)
    unit_ends = cost.cumsum(0)
    unit_starts, line_end = unit_ends - cost, unit_ends[-1:]
    stretch = _ceil_div(line_end, cut.programs)
    bounds = (torch.arange(cut.programs + 1, device=device) * stretch).minimum(line_end)

    if cut.split is None:
        starts = torch.cat((unit_starts, bounds[:-1])).sort().values
    else:
        starts = _fixed_starts(cost, unit_starts, cut.split, launch.items).minimum(line_end)
    ends = torch.cat((starts[1:], line_end))
    # Of equal starts only the last begins an item that is not empty.
    unit = torch.searchsorted(unit_ends, starts, right=True).clamp_(max=len(cost) - 1)
    first_item = torch.searchsorted(starts, unit_starts[unit], right=True) - 1
    parts = (torch.searchsorted(starts, unit_ends[unit]) - first_item) * (ends > starts)
    index = torch.arange(len(starts), device=device) - first_item
    first_slot = (parts > 1).cumsum(0) - 1 - index
    kv_first = (starts - unit_starts[unit]) * cut.kv_tile
    head, tile_of = unit // launch.tiles, unit % launch.tiles
    kv_last = (kv_first + (ends - starts) * cut.kv_tile).minimum(kv_end[tile_of])
    row = query_starts[sequence] + first_token
    fields = (
        sequence[tile_of],
        row[tile_of],
        tokens[tile_of],
        position[tile_of],
        head,
        kv_first,
        kv_last,
        parts,
        first_slot,
        index,
    )
    return WorkList(
        items=torch.stack(fields, dim=1).int(),
        program_starts=torch.searchsorted(starts, bounds).int(),
        slots=launch.slots,
    )


def _fixed_starts(cost: Tensor, unit_starts: Tensor, split: int, items: int) -> Tensor:
    """Where items begin on the line when every unit is cut at multiples of split; beyond the last, the line's end."""
    pieces = _ceil_div(cost, split)
    piece_ends = pieces.cumsum(0)
    item = torch.arange(items, device=cost.device)
    unit = torch.searchsorted(piece_ends, item, right=True).clamp_(max=len(cost) - 1)
    return unit_starts[unit] + (item - (piece_ends - pieces)[unit]) * split


def _ceil_div(a: Tensor, b: int) -> Tensor:
    return -(-a // b)
