"""Batches as tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.batch import Batch, Row, TokenSource
from pdserve.worker.inputs import ForwardInputs, InputBuilder

PREFILL = Row(sequence_id=1, start=3, num_tokens=4, token_ids=(10, 11, 12, 13), block_ids=(5, 2), sample=True)
DECODE = Row(
    sequence_id=2,
    start=4,
    num_tokens=1,
    token_ids=(),
    block_ids=(7, 9, 1),
    token_source=TokenSource.PREVIOUS_STEP,
    sample=True,
)
PREFILL_END = Row(sequence_id=1, start=6, num_tokens=1, token_ids=(13,), block_ids=(5, 2), sample=True)
CHUNK = Row(sequence_id=3, start=0, num_tokens=2, token_ids=(20, 21), block_ids=(0,))


def build(*rows: Row, previous: dict[int, int] | None = None) -> ForwardInputs:
    return builder().build(Batch(step=0, rows=rows), previous or {})


def builder() -> InputBuilder:
    return InputBuilder(block_size=4, device=torch.device("cpu"))


def test_a_mixed_step_is_laid_out_ragged() -> None:
    inputs = build(PREFILL, DECODE, CHUNK, previous={2: 99})
    attention = inputs.attention
    assert inputs.token_ids.tolist() == [10, 11, 12, 13, 99, 20, 21]
    assert inputs.positions.tolist() == [3, 4, 5, 6, 4, 0, 1]
    assert attention.slots.tolist() == [23, 8, 9, 10, 36, 0, 1]
    assert attention.query_starts.tolist() == [0, 4, 5, 7]
    assert attention.kv_lens.tolist() == [7, 5, 2]
    assert tables(inputs, PREFILL, DECODE, CHUNK) == [(5, 2), (7, 9, 1), (0,)]
    assert (attention.query_lens_host, attention.kv_lens_host) == ((4, 1, 2), (7, 5, 2))
    assert inputs.sampled is not None
    assert inputs.sampled.tolist() == [3, 4]


def tables(inputs: ForwardInputs, *rows: Row) -> list[tuple[int, ...]]:
    """The part of each row's table that means something."""
    return [
        tuple(line[: len(row.block_ids)])
        for line, row in zip(inputs.attention.block_tables.tolist(), rows, strict=False)
    ]


def test_a_step_without_samples_wants_no_logits() -> None:
    sampled = build(CHUNK).sampled
    assert sampled is not None
    assert sampled.shape == (0,)


def test_one_sampled_token_each_needs_no_choice_of_rows() -> None:
    inputs = build(DECODE, PREFILL_END, previous={2: 99})
    attention = inputs.attention
    assert inputs.sampled is None
    assert inputs.token_ids.tolist() == [99, 13]
    assert inputs.positions.tolist() == [4, 6]
    assert attention.slots.tolist() == [36, 10]
    assert attention.query_starts.tolist() == [0, 1, 2]
    assert (attention.query_lens_host, attention.kv_lens_host) == ((1, 1), (5, 7))


@given(
    steps=st.lists(
        st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=90).map(tuple), min_size=1, max_size=40),
        min_size=1,
        max_size=6,
    )
)
def test_every_step_sees_its_own_tables_whatever_came_before(steps: list[list[tuple[int, ...]]]) -> None:
    kept = builder()
    for number, blocks in enumerate(steps):
        rows = tuple(
            Row(sequence_id=i, start=4 * len(own) - 1, num_tokens=1, token_ids=(7,), block_ids=own, sample=True)
            for i, own in enumerate(blocks)
        )
        inputs = kept.build(Batch(step=number, rows=rows), {})
        assert tables(inputs, *rows) == blocks
        assert inputs.attention.slots.tolist() == [4 * own[-1] + 3 for own in blocks]


def test_a_token_the_step_before_did_not_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="sequence 2: the step before sampled nothing"):
        build(DECODE, previous={1: 99})


def test_token_ids_must_match_num_tokens() -> None:
    row = Row(sequence_id=1, start=0, num_tokens=2, token_ids=(1,), block_ids=(0,))
    with pytest.raises(ValueError, match="1 token ids for 2 tokens"):
        build(row)


@pytest.mark.parametrize(
    "row",
    [
        Row(sequence_id=1, start=0, num_tokens=1, token_ids=(1,), block_ids=(0,), adapter_id=3),
        Row(sequence_id=1, start=0, num_tokens=1, token_ids=(1,), block_ids=(0,), draft_token_ids=(4,)),
    ],
)
def test_drafts_and_adapters_are_refused(row: Row) -> None:
    with pytest.raises(ValueError, match="not supported"):
        build(row)
