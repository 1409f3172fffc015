"""Steps for paged attention: ragged lengths, KV scattered over poisoned memory, and the kernel run on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve_kernels.paged_attention.reference import paged_attention as reference
from pdserve_kernels.paged_attention.tuning import Purpose, Tuning, tuning_for
from pdserve_kernels.paged_attention.work_list import Cut, build_work_list, launches

PADDING_ROWS = 3
POISON = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model's attention and of its paged memory."""

    head_dim: int
    kv_heads: int = 2
    group: int = 4
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    block_major: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """lens: (new tokens, tokens in all) of each sequence. q has PADDING_ROWS of poison at its end; kv is one of two
    layers, poisoned wherever no token lies; tables lead to a poisoned block beyond a sequence's own."""

    shape: Shape
    lens: tuple[tuple[int, int], ...]
    q: Tensor
    kv: Tensor
    tables: NDArray[np.int64]

    @property
    def query_lens(self) -> NDArray[np.int64]:
        return np.array([new for new, _ in self.lens])

    @property
    def kv_lens(self) -> NDArray[np.int64]:
        return np.array([total for _, total in self.lens])

    @property
    def query_starts(self) -> NDArray[np.int64]:
        return np.concatenate(([0], self.query_lens.cumsum()))

    def expected(self) -> NDArray[np.float64]:
        """Of the rows that are not padding."""
        q, kv = (x.double().cpu().numpy() for x in (self.q[:-PADDING_ROWS], self.kv))
        scale = self.shape.head_dim**-0.5
        return reference(q, kv, self.tables, self.query_starts, self.kv_lens, scale)


def make_step(shape: Shape, lens: Sequence[tuple[int, int]], seed: int = 0) -> Step:
    """Each sequence's tokens are random by (seed, its place in lens)."""
    size, dim = shape.block_size, shape.head_dim
    counts = [-(-total // size) for _, total in lens]
    blocks, width = sum(counts) + 1, max(1, *counts) + 1
    permuted = np.random.default_rng(seed).permutation(blocks)
    tables = np.full((len(lens), width), permuted[-1])
    if shape.block_major:
        memory = torch.full((blocks, 2, 2, shape.kv_heads, size, dim), POISON, dtype=shape.dtype)[:, 1]
    else:
        memory = torch.full((2, blocks, 2, shape.kv_heads, size, dim), POISON, dtype=shape.dtype)[1]
    queries, used = [], 0
    for sequence, (new, total) in enumerate(lens):
        generator = torch.Generator().manual_seed(1000 * seed + sequence)
        own = permuted[used : used + counts[sequence]]
        used += counts[sequence]
        tables[sequence, : len(own)] = own
        place = np.arange(total)
        # One generator per sequence and KV first: the same tokens, however many of them are new.
        kv = torch.randn(total, 2, shape.kv_heads, dim, generator=generator).to(shape.dtype)
        memory[own[place // size], :, :, place % size] = kv
        heads = shape.kv_heads * shape.group
        queries.append(
            torch.randn(max(new, total), heads, dim, generator=generator).to(shape.dtype)[max(new, total) - new :]
        )
    padding = torch.full((PADDING_ROWS, shape.kv_heads * shape.group, dim), POISON, dtype=shape.dtype)
    return Step(shape=shape, lens=tuple(lens), q=torch.cat((*queries, padding)), kv=memory, tables=tables)


def tuning_of(shape: Shape, purpose: Purpose) -> Tuning:
    """That of the 16-bit types, which the interpreter also runs with others."""
    return tuning_for(purpose, shape.head_dim, shape.group, 2)


def attend(step: Step, tuning: Tuning, *, split: int | None = None, programs: int = 5) -> Tensor:
    """The kernel's results, padding rows included; outputs and states begin as poison. split is in KV tiles."""
    from pdserve_kernels.paged_attention.kernel import allocate_states, paged_attention

    shape, device = step.shape, step.q.device
    query_tile = tuning.rows // shape.group
    cut = Cut(query_tile=query_tile, kv_tile=tuning.kv_tile, kv_heads=shape.kv_heads, programs=programs, split=split)
    starts, lens, kv_lens, tables = (
        torch.from_numpy(x).to(device) for x in (step.query_starts[:-1], step.query_lens, step.kv_lens, step.tables)
    )
    out = torch.full_like(step.q, POISON)
    for launch in launches(cut, step.query_lens, step.kv_lens):
        states = allocate_states(launch.slots, query_tile * shape.group, shape.head_dim, device)
        for state in (states.accs, states.peaks, states.totals):
            state.fill_(POISON)
        work = build_work_list(cut, launch, starts, lens, kv_lens)
        paged_attention(step.q, step.kv, tables, work, states, out, tuning=tuning)
        assert not states.arrivals.any(), "counters must be ready for the next layer"
    return out
