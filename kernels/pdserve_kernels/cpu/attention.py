"""Paged attention that reads keys and values where they lie.

A block's keys, then its values: in every memory order a layer's share of a block is one span, and a core reads it
almost as fast as memory gives it. So softmax is computed along the way (https://arxiv.org/abs/1805.02867).
"""

from typing import Any

import numpy as np

from pdserve_kernels.cpu.elements import compiled, exponential, inlined, narrow, widen

SPAN = 16
"""Places between two looks at the peak, counted from a sequence's first: the block size changes no bit."""

_LEAST = np.float32(-3e38)


@inlined
def _score(query: Any, keys: Any, count: Any, weights: Any) -> None:
    """Products of one key head's first `count` keys with its queries (group, dim). Slots are read one after the
    other: four at a time would hide the stream from the processor and cost two thirds of the bandwidth."""
    group, dim = query.shape
    for slot in range(count):
        key = keys[slot * dim : (slot + 1) * dim]
        for member in range(group):
            asked = query[member]
            product = np.float32(0)
            for j in range(dim):
                product += asked[j] * widen(key[j])
            weights[member, slot] = product


@inlined
def _soften(weights: Any, count: Any, peaks: Any, totals: Any, mixed: Any) -> None:
    """Scores to weights relative to the peak so far; what was mixed under an earlier peak is scaled down to it."""
    for head in range(len(peaks)):
        row = weights[head]
        peak = peaks[head]
        for slot in range(count):
            peak = row[slot] if row[slot] > peak else peak
        faded = exponential(peaks[head] - peak)
        total = np.float32(0)
        for slot in range(count):
            weight = exponential(row[slot] - peak)
            row[slot] = weight
            total += weight
        peaks[head] = peak
        totals[head] = totals[head] * faded + total
        mix = mixed[head]
        for j in range(len(mix)):
            mix[j] *= faded


@inlined
def _mix(weights: Any, values: Any, count: Any, mixed: Any) -> None:
    """Add one key head's first `count` values, weighted, to what its queries (group, dim) have mixed."""
    group, dim = mixed.shape
    for slot in range(count):
        value = values[slot * dim : (slot + 1) * dim]
        for member in range(group):
            weight = weights[member, slot]
            mix = mixed[member]
            for j in range(dim):
                mix[j] += weight * widen(value[j])


@inlined
def _piece(table: Any, place: Any, end: Any, block_size: Any, block_stride: Any, dim: Any) -> Any:
    """Where the keys of the first head lie from a place on, and how many places follow it in its block before end."""
    slot = place % block_size
    return table[place // block_size] * block_stride + slot * dim, min(block_size - slot, end - place)


@inlined
def _load(rows: Any, scale: Any, wide: Any) -> None:
    """A token's queries (heads, dim) as float32, scaled."""
    heads, dim = wide.shape
    for head in range(heads):
        for j in range(dim):
            wide[head, j] = widen(rows[head, j]) * scale


@inlined
def _store(mixed: Any, totals: Any, out: Any) -> None:
    """What a token's heads have mixed, over the sum of their weights."""
    heads, dim = mixed.shape
    for head in range(heads):
        share = np.float32(1) / totals[head]
        for j in range(dim):
            out[head, j] = narrow(mixed[head, j] * share, out)


@compiled
def attend(
    q: Any,
    memory: Any,
    block_stride: Any,
    kv_heads: Any,
    block_size: Any,
    tables: Any,
    owners: Any,
    visible: Any,
    scale: Any,
    out: Any,
) -> None:
    """q, out (rows, heads, head_dim); rows beyond len(owners) are padding and become zero.

    memory (elements,) begins at the layer's first block, and blocks are block_stride elements apart; within a block
    [k|v][head][slot][dim]. tables (sequences, blocks); owners and visible (tokens,): a token's sequence, and how many
    of its places, one or more, the token sees.
    """
    heads, dim = q.shape[1], q.shape[2]
    group, head_size = heads // kv_heads, block_size * dim
    query = np.empty((heads, dim), np.float32)
    mixed = np.empty((heads, dim), np.float32)
    weights = np.empty((heads, SPAN), np.float32)
    peaks = np.empty(heads, np.float32)
    totals = np.empty(heads, np.float32)
    for token in range(len(owners)):
        _load(q[token], scale, query)
        mixed[:] = np.float32(0)
        peaks[:] = _LEAST
        totals[:] = np.float32(0)
        table = tables[owners[token]]
        for first in range(0, visible[token], SPAN):
            end = min(first + SPAN, visible[token])
            place = first
            while place < end:
                at, count = _piece(table, place, end, block_size, block_stride, dim)
                for kv_head in range(kv_heads):
                    members = slice(kv_head * group, (kv_head + 1) * group)
                    keys = memory[at + kv_head * head_size :]
                    _score(query[members], keys, count, weights[members, place - first :])
                place += count
            _soften(weights, end - first, peaks, totals, mixed)
            place = first
            while place < end:
                at, count = _piece(table, place, end, block_size, block_stride, dim)
                for kv_head in range(kv_heads):
                    members = slice(kv_head * group, (kv_head + 1) * group)
                    values = memory[at + (kv_heads + kv_head) * head_size :]
                    _mix(weights[members, place - first :], values, count, mixed[members])
                place += count
        _store(mixed, totals, out[token])
    zero = np.float32(0)
    out[len(owners) :] = narrow(zero, out)
