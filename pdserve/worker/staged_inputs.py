"""From a Batch to the tensors of a forward pass that the host composes: one array, one copy, nobody waits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pdserve.attention.base import AttentionMetadata
from pdserve.core.batch import Row, TokenSource
from pdserve.worker.device_rows import DeviceRows
from pdserve.worker.inputs import ForwardInputs
from pdserve.worker.staging import Staging

Integers = NDArray[np.int64]


def stage_inputs(
    rows: Sequence[Row], device_rows: DeviceRows, staging: Staging, block_size: int
) -> tuple[ForwardInputs, Tensor]:
    """A step's inputs, and of its sampled rows where their tokens go, (sampled rows,). Tokens of the step before are
    taken from where that step left them."""
    lens = np.array([row.num_tokens for row in rows])
    starts = np.array([row.start for row in rows])
    ends = lens.cumsum()
    tables = _tables(rows)
    of_token = np.repeat(np.arange(len(rows)), lens)
    positions = np.arange(ends[-1]) - np.repeat(ends - lens - starts, lens)
    slots = tables[of_token, positions // block_size] * block_size + positions % block_size
    awaiting = [i for i, row in enumerate(rows) if row.token_source is TokenSource.PREVIOUS_STEP]
    sampled = [i for i, row in enumerate(rows) if row.sample]
    come_from = device_rows.rows_of([rows[i] for i in awaiting])
    device_rows.follow(rows)
    parts: list[Integers] = [
        _tokens(rows),
        positions,
        slots,
        np.concatenate(([0], ends)),
        starts + lens,
        tables.ravel(),
        ends[sampled] - 1,
        np.array(device_rows.rows_of([rows[i] for i in sampled]), dtype=np.int64),
        ends[awaiting] - 1,
        np.array(come_from, dtype=np.int64),
    ]
    tokens, places, slot, query_starts, kv_lens, table, last, targets, late, sources = staging.to_device_together(parts)
    if awaiting:
        tokens.index_copy_(0, late, device_rows.last_tokens(sources))
    metadata = AttentionMetadata(
        block_tables=table.view(tables.shape),
        query_starts=query_starts,
        kv_lens=kv_lens,
        slots=slot,
        query_lens_host=tuple(lens.tolist()),
        kv_lens_host=tuple((starts + lens).tolist()),
    )
    return ForwardInputs(token_ids=tokens, positions=places, attention=metadata, sampled=last), targets


def check_supported(rows: Sequence[Row]) -> None:
    """Raises ValueError for rows this worker cannot compute, or that contradict themselves."""
    for row in rows:
        if row.draft_token_ids or row.adapter_id:
            raise ValueError(f"sequence {row.sequence_id}: drafts and adapters are not supported by this worker")
        known = row.num_tokens if row.token_source is TokenSource.KNOWN else 0
        if len(row.token_ids) != known or (not known and row.num_tokens != 1):
            raise ValueError(f"sequence {row.sequence_id}: {len(row.token_ids)} token ids for {row.num_tokens} tokens")


def _tokens(rows: Sequence[Row]) -> Integers:
    """Zero where the step before tells."""
    return np.concatenate([np.array(row.token_ids or (0,), dtype=np.int64) for row in rows])


def _tables(rows: Sequence[Row]) -> Integers:
    """(rows, blocks), padded with 0."""
    tables = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int64)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_ids)] = row.block_ids
    return tables
