"""Attention by the Triton kernel of pdserve_kernels.paged_attention: on GPUs, and on CPUs in Triton's interpreter.

A plan builds the work lists of its step once; every layer's run launches the kernel on them. Sequences with few new
tokens (decode, verification of drafts) and those with many (prefill) are tuned differently and take a launch each.
Deterministic, all tokens take one way, on which results depend on nothing but a token's own KV.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.attention.base import AttentionMetadata, DecodeMetadata
from pdserve_kernels.paged_attention.decode_list import decode_work_list
from pdserve_kernels.paged_attention.kernel import States, allocate_states, paged_attention
from pdserve_kernels.paged_attention.tuning import FIXED_SPLIT, Purpose, Tuning, tuning_for
from pdserve_kernels.paged_attention.work_list import MAX_ITEMS, Cut, Launch, WorkList, build_work_list, launches

INTERPRETED_PROGRAMS = 4
_Lens = TypeVar("_Lens", Tensor, NDArray[np.int64])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """A tuning of the kernel, how it cuts steps, and the numbers of new tokens whose sequences take this way."""

    tuning: Tuning
    cut: Cut
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    work: WorkList
    tuning: Tuning
    states: States


class TritonAttention:
    """The backend, for the heads of one rank. dtype is that of queries and KV."""

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        self._kv_heads = kv_heads
        self._group = heads // kv_heads
        self._head_dim = head_dim
        self._block_size = block_size
        self._itemsize = dtype.itemsize
        self._device = device
        self._states: dict[int, States] = {}
        if deterministic:
            self._ways = [self._way(Purpose.INVARIANT)]
        else:
            few = self._way(Purpose.DECODE).cut.query_tile
            self._ways = [self._way(Purpose.DECODE, most=few), self._way(Purpose.PREFILL, least=few + 1)]

    def plan(self, metadata: AttentionMetadata) -> "TritonPlan":
        new, total = np.array(metadata.query_lens_host), np.array(metadata.kv_lens_host)
        planned = [
            self._planned(way, launch, metadata)
            for way in self._ways
            for launch in launches(way.cut, _taking(way, new), total)
        ]
        return TritonPlan(metadata.slots, metadata.block_tables, self._block_size, planned)

    def plan_decode(self, metadata: DecodeMetadata) -> "TritonPlan":
        """Without a word from the host, so that a graph can hold it, for steps that decode_fits."""
        way = self._ways[0]
        longest = metadata.block_tables.shape[1] * self._block_size
        work = decode_work_list(way.cut, metadata.table_rows, metadata.kv_lens, longest)
        planned = _Planned(work=work, tuning=way.tuning, states=self._states_for(way, work.slots))
        return TritonPlan(metadata.slots, metadata.block_tables, self._block_size, [planned])

    def decode_fits(self, kv_lens: Sequence[int], sequences: int) -> bool:
        """Whether plan_decode for so many sequences holds these lengths, the others being padding."""
        cut = self._ways[0].cut
        if cut.split is None:
            return True
        part = cut.kv_tile * cut.split
        parts = sum(-(-length // part) for length in kv_lens) + sequences - len(kv_lens)
        return parts * cut.kv_heads <= MAX_ITEMS

    def _way(self, purpose: Purpose, *, least: int = 1, most: int = 1 << 30) -> _Way:
        tuning = tuning_for(purpose, self._head_dim, self._group, self._itemsize)
        cut = Cut(
            query_tile=tuning.rows // self._group,
            kv_tile=tuning.kv_tile,
            kv_heads=self._kv_heads,
            programs=_multiprocessors(self._device) * tuning.programs,
            split=FIXED_SPLIT // tuning.kv_tile if purpose is Purpose.INVARIANT else None,
        )
        return _Way(tuning=tuning, cut=cut, least=least, most=most)

    def _planned(self, way: _Way, launch: Launch, metadata: AttentionMetadata) -> _Planned:
        new = metadata.query_starts.diff()
        work = build_work_list(way.cut, launch, metadata.query_starts[:-1], _taking(way, new), metadata.kv_lens)
        return _Planned(work=work, tuning=way.tuning, states=self._states_for(way, work.slots))

    def _states_for(self, way: _Way, slots: int) -> States:
        """Launches follow each other on one stream, and so share their working memory."""
        rows = way.cut.query_tile * self._group
        held = self._states.get(rows)
        if held is None or held.arrivals.shape[0] < slots:
            held = self._states[rows] = allocate_states(slots, rows, self._head_dim, self._device)
        return held


class TritonPlan:
    """A step's launches; run for each layer in turn."""

    def __init__(self, slots: Tensor, tables: Tensor, block_size: int, planned: list[_Planned]) -> None:
        self.slots = slots
        self._tables = tables
        self._block_size = block_size
        self._planned = planned

    def run(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        tokens = self.slots.shape[0]
        blocks, offsets = self.slots // self._block_size, self.slots % self._block_size
        kv[:, 0][blocks, :, offsets] = k[:tokens]
        kv[:, 1][blocks, :, offsets] = v[:tokens]
        return self.attend(q, kv)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        out = q.new_empty(q.shape)
        out[self.slots.shape[0] :] = 0
        for planned in self._planned:
            paged_attention(q, kv, self._tables, planned.work, planned.states, out, tuning=planned.tuning)
        return out


def _taking(way: _Way, new: _Lens) -> _Lens:
    """Numbers of new tokens, 0 for sequences that do not take this way."""
    return new * ((new >= way.least) & (new <= way.most))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
