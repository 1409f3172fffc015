"""From a Batch to the tensors of a forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pdserve.attention.base import AttentionMetadata
from pdserve.core.batch import Batch, Row, TokenSource


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
    ends = list(accumulate(lens, initial=0))
    tokens = [token for row in rows for token in _row_tokens(row, previous_tokens)]
    positions = [position for row in rows for position in range(row.start, row.start + row.num_tokens)]
    slots = [
        row.block_ids[place // block_size] * block_size + place % block_size
        for row in rows
        for place in range(row.start, row.start + row.num_tokens)
    ]
    width = max((len(row.block_ids) for row in rows), default=0)
    tables = [[*row.block_ids, *(0,) * (width - len(row.block_ids))] for row in rows]
    kv_lens = tuple(row.start + row.num_tokens for row in rows)
    return ForwardInputs(
        token_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        attention=AttentionMetadata(
            block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
            query_starts=torch.tensor(ends, dtype=torch.int64, device=device),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            query_lens_host=lens,
            kv_lens_host=kv_lens,
        ),
        sampled=torch.tensor(
            [end - 1 for row, end in zip(rows, ends[1:], strict=True) if row.sample], dtype=torch.int64, device=device
        ),
    )


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
