"""Spans of a pull: every byte of every block, once, whatever the two orders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.layout import KVGroup, KVLayout, KVOrder
from pdserve.transfer.plan import canonical_spans, plan_read
from tests.kv_layouts import by_block, kv_layout

orders = st.sampled_from(KVOrder)
groups = st.builds(
    KVGroup,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@st.composite
def reads(draw: st.DrawFn) -> tuple[KVLayout, list[int], KVLayout, list[int]]:
    group = draw(groups)
    sizes = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    source, target = (kv_layout(size, draw(orders), group=group) for size in sizes)
    count = draw(st.integers(1, min(sizes)))
    pick = [draw(st.permutations(range(size)))[:count] for size in sizes]
    return source, pick[0], target, pick[1]


@given(reads())
def test_copying_the_spans_copies_exactly_the_blocks(case: tuple[KVLayout, list[int], KVLayout, list[int]]) -> None:
    source, source_blocks, target, target_blocks = case
    remote = np.random.default_rng(1).integers(0, 256, source.total_bytes, dtype=np.uint8)
    local = np.random.default_rng(2).integers(0, 256, target.total_bytes, dtype=np.uint8)
    expected = by_block(target, local.copy()).copy()
    expected[target_blocks] = by_block(source, remote)[source_blocks]

    plan = plan_read(source, tuple(source_blocks), target, tuple(target_blocks))
    for at, where, length in zip(plan.remote.tolist(), plan.local.tolist(), plan.lengths.tolist(), strict=True):
        local[where : where + length] = remote[at : at + length]

    assert plan.num_bytes == source.block_bytes * len(source_blocks)
    np.testing.assert_array_equal(by_block(target, local), expected)


@given(groups, orders, st.permutations(range(7)))
def test_canonical_spans_name_the_bytes_of_the_blocks_in_order(
    group: KVGroup, order: KVOrder, blocks: list[int]
) -> None:
    layout = kv_layout(9, order, group=group)
    memory = np.random.default_rng(3).integers(0, 256, layout.total_bytes, dtype=np.uint8)
    offsets, lengths = canonical_spans(layout, tuple(blocks))
    joined = b"".join(memory[o : o + n].tobytes() for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True))
    assert joined == by_block(layout, memory)[blocks].tobytes()


@pytest.mark.parametrize("order", KVOrder)
def test_adjacent_blocks_become_one_span_per_contiguous_run(order: KVOrder) -> None:
    layout = kv_layout(16, order)
    runs = 1 if order is KVOrder.BLOCK_MAJOR else layout.group.num_layers
    adjacent = plan_read(layout, (3, 4, 5), layout, (9, 10, 11))
    assert len(adjacent.lengths) == runs
    apart = plan_read(layout, (3, 4, 5), layout, (9, 11, 10))
    assert len(apart.lengths) == 3 * runs


@pytest.mark.parametrize(
    ("source_blocks", "target_blocks"),
    [((1, 2), (1,)), ((), ()), ((1, 2), (5, 5)), ((16,), (1,)), ((1,), (16,)), ((-1,), (1,)), ((1,), (-1,))],
)
def test_lists_that_do_not_pair_up_or_leave_the_memory_are_refused(
    source_blocks: tuple[int, ...], target_blocks: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="block"):
        plan_read(kv_layout(), source_blocks, kv_layout(), target_blocks)
