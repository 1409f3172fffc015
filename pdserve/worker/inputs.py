"""From a Batch to the tensors of a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.attention.base import AttentionMetadata
from pdserve.core.batch import Batch, Row, TokenSource

Indices = NDArray[np.int64]

_FIRST_TABLES = (16, 64)
"""Rows and blocks there is room for at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardInputs:
    """token_ids, positions (tokens,) int64; sampled (sampled rows,) the token index whose logits are wanted, None where
    every token's are."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    sampled: Tensor | None


class InputBuilder:
    """Lays steps out as ragged tensors, which hold until the next one is built.

    Block tables stay from step to step: a row whose table is that of the row that had its place costs nothing, one that
    has grown costs its new blocks.
    """

    def __init__(self, *, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._on_host = device.type == "cpu"
        self._make_room(*_FIRST_TABLES)

    def build(self, batch: Batch, previous_tokens: Mapping[int, int]) -> ForwardInputs:
        """previous_tokens: by sequence id, what the step before sampled; rows that await such a token take it there."""
        rows = batch.rows
        if len(rows) > len(self._tables):
            self._make_room(2 * len(rows), self._tables.shape[1])
        tokens: list[int] = []
        decoding = True
        for place, row in enumerate(rows):
            if row.block_ids is not self._written[place]:
                self._write(place, row.block_ids)
            if row.token_source is TokenSource.PREVIOUS_STEP and not row.draft_token_ids and not row.adapter_id:
                tokens.append(_previous(row, previous_tokens))
            else:
                tokens += _known(row)
            decoding = decoding and row.sample and row.num_tokens == 1
        return self._decode(rows, tokens) if decoding else self._ragged(rows, tokens)

    def _decode(self, rows: Sequence[Row], tokens: list[int]) -> ForwardInputs:
        """One new token per row, and all sampled. Counted in Python and made one array: an operation of numpy's in
        every step costs what ten rows cost, because the forward pass in between has emptied the caches."""
        size = self._block_size
        positions = [row.start for row in rows]
        kv_lens = [position + 1 for position in positions]
        slots = [row.block_ids[row.start // size] * size + row.start % size for row in rows]
        numbers = np.array([*tokens, *positions, *slots, *kv_lens], dtype=np.int64)
        columns = self._tensor(numbers).view(4, -1).unbind()
        return ForwardInputs(
            token_ids=columns[0],
            positions=columns[1],
            attention=AttentionMetadata(
                block_tables=self._block_tables(),
                query_starts=self._counting[: len(rows) + 1],
                kv_lens=columns[3],
                slots=columns[2],
                query_lens_host=(1,) * len(rows),
                kv_lens_host=tuple(kv_lens),
            ),
            sampled=None,
        )

    def _ragged(self, rows: Sequence[Row], tokens: list[int]) -> ForwardInputs:
        lens = np.array([row.num_tokens for row in rows], dtype=np.int64)
        kv_lens = np.array([row.start for row in rows], dtype=np.int64) + lens
        starts = np.zeros(len(lens) + 1, dtype=np.int64)
        np.cumsum(lens, out=starts[1:])
        owners = np.repeat(np.arange(len(lens)), lens)
        # The last token of a row stands right before its kv_len.
        positions = np.arange(len(owners)) + (kv_lens - starts[1:])[owners]
        blocks, offsets = np.divmod(positions, self._block_size)
        slots = self._tables[owners, blocks] * self._block_size + offsets
        sampled = starts[1:][np.array([row.sample for row in rows], dtype=bool)] - 1
        return ForwardInputs(
            token_ids=self._tensor(np.array(tokens, dtype=np.int64)),
            positions=self._tensor(positions),
            attention=AttentionMetadata(
                block_tables=self._block_tables(),
                query_starts=self._tensor(starts),
                kv_lens=self._tensor(kv_lens),
                slots=self._tensor(slots),
                query_lens_host=tuple(lens.tolist()),
                kv_lens_host=tuple(kv_lens.tolist()),
            ),
            sampled=self._tensor(sampled),
        )

    def _tensor(self, array: Indices) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._on_host else tensor.to(self._device)

    def _block_tables(self) -> Tensor:
        return self._tables_tensor if self._on_host else self._tables_tensor.to(self._device)

    def _make_room(self, rows: int, blocks: int) -> None:
        """Empty tables of another size."""
        self._tables: Indices = np.zeros((rows, blocks), dtype=np.int64)
        self._tables_tensor = torch.from_numpy(self._tables)
        self._written: list[tuple[int, ...]] = [()] * rows
        self._counting = torch.arange(rows + 1, device=self._device)

    def _write(self, place: int, blocks: tuple[int, ...]) -> None:
        """Make a row's table the one at its place."""
        if len(blocks) > self._tables.shape[1]:
            tables, written = self._tables, self._written
            self._make_room(len(tables), 2 * len(blocks))
            self._tables[:, : tables.shape[1]] = tables
            self._written = written
        there = self._written[place]
        kept = len(there) if blocks[: len(there)] == there else 0
        self._tables[place, kept : len(blocks)] = blocks[kept:]
        self._written[place] = blocks


def _previous(row: Row, previous_tokens: Mapping[int, int]) -> int:
    token = previous_tokens.get(row.sequence_id)
    if token is None:
        raise ValueError(f"sequence {row.sequence_id}: the step before sampled nothing for it")
    return token


def _known(row: Row) -> tuple[int, ...]:
    if row.draft_token_ids or row.adapter_id:
        raise ValueError(f"sequence {row.sequence_id}: drafts and adapters are not supported by this worker")
    if len(row.token_ids) != row.num_tokens:
        raise ValueError(f"sequence {row.sequence_id}: {len(row.token_ids)} token ids for {row.num_tokens} tokens")
    return row.token_ids
