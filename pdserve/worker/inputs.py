"""From a Batch to the tensors of a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdserve.attention.base import AttentionMetadata
from pdserve.core.batch import Batch, Row, TokenSource

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardInputs:
    """token_ids, positions (tokens,) int64; sampled (sampled rows,) the token index whose logits are wanted."""

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    sampled: Tensor


def build_inputs(
    batch: Batch, previous_tokens: Mapping[int, int], *, block_size: int, device: torch.device
) -> ForwardInputs:
    """Lay a step out as ragged tensors.

    previous_tokens: by sequence id, what the step before sampled; rows that await such a token take it there.
    """
    rows = batch.rows
    lens = tuple(row.num_tokens for row in rows)
    kv_lens = tuple(row.start + row.num_tokens for row in rows)
    ends = np.cumsum(lens, dtype=np.int64)
    owners = np.repeat(np.arange(len(rows)), lens)
    # The last token of a row stands right before its kv_len.
    positions = np.arange(len(owners)) + (np.array(kv_lens, dtype=np.int64) - ends)[owners]
    tables = _block_tables(rows)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    tokens = np.array([token for row in rows for token in _row_tokens(row, previous_tokens)], dtype=np.int64)
    sampled = ends[np.array([row.sample for row in rows], dtype=bool)] - 1

    def tensor(array: Indices) -> Tensor:
        return torch.from_numpy(array).to(device)

    return ForwardInputs(
        token_ids=tensor(tokens),
        positions=tensor(positions),
        attention=AttentionMetadata(
            block_tables=tensor(tables),
            query_starts=tensor(np.concatenate((np.zeros(1, dtype=np.int64), ends))),
            kv_lens=tensor(np.array(kv_lens, dtype=np.int64)),
            slots=tensor(slots),
            query_lens_host=lens,
            kv_lens_host=kv_lens,
        ),
        sampled=tensor(sampled),
    )


def _block_tables(rows: Sequence[Row]) -> Indices:
    """(rows, blocks of the longest), 0 beyond a row's own."""
    counts = np.array([len(row.block_ids) for row in rows], dtype=np.int64)
    tables = np.zeros((len(rows), counts.max(initial=0)), dtype=np.int64)
    blocks = np.fromiter(chain.from_iterable(row.block_ids for row in rows), np.int64, counts.sum())
    tables[np.arange(tables.shape[1]) < counts[:, None]] = blocks
    return tables


def _row_tokens(row: Row, previous_tokens: Mapping[int, int]) -> tuple[int, ...]:
    if row.draft_token_ids or row.adapter_id:
        raise ValueError(f"sequence {row.sequence_id}: drafts and adapters are not supported by this worker")
    if row.token_source is TokenSource.KNOWN:
        if len(row.token_ids) != row.num_tokens:
            raise ValueError(f"sequence {row.sequence_id}: {len(row.token_ids)} token ids for {row.num_tokens} tokens")
        return row.token_ids
    if row.sequence_id not in previous_tokens:
        raise ValueError(f"sequence {row.sequence_id}: the step before sampled nothing for it")
    return (previous_tokens[row.sequence_id],)
