"""Spans of a pull: every byte of a region, once, whatever the two orders and the heads beside it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.core.layout import KVGroup, KVLayout, KVOrder, KVRegion
from pdserve.transfer.plan import canonical_spans, plan_read
from tests.kv_layouts import by_block, kv_layout

LAYOUT = kv_layout()
orders = st.sampled_from(KVOrder)
groups = st.builds(
    KVGroup,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.just(1),
    head_dim=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@dataclass(frozen=True)
class Read:
    source: KVLayout
    taken: KVRegion
    target: KVLayout
    filled: KVRegion


@st.composite
def reads(draw: st.DrawFn) -> Read:
    """Some layers of as many heads of a source's blocks as of a target's; the memories may have other heads besides."""
    group = draw(groups)
    num_heads = draw(st.integers(1, 3))
    first_layer = draw(st.integers(0, group.num_layers - 1))
    layers = (first_layer, draw(st.integers(first_layer + 1, group.num_layers)))
    sizes = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    count = draw(st.integers(1, min(sizes)))
    sides: list[tuple[KVLayout, KVRegion]] = []
    for size in sizes:
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        own = replace(group, num_kv_heads=before + num_heads + after)
        blocks = tuple(draw(st.permutations(range(size)))[:count])
        region = KVRegion(group=0, blocks=blocks, layers=layers, heads=(before, before + num_heads))
        sides.append((kv_layout(size, draw(orders), group=own), region))
    return Read(*sides[0], *sides[1])


def bytes_of(layout: KVLayout, region: KVRegion, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The region's bytes as [block, layer, k|v, head, slot, bytes of dim]."""
    found = by_block(layout, memory)[list(region.blocks)]
    return found[:, slice(*region.layers), :, slice(*region.heads)]


@given(reads())
def test_copying_the_spans_copies_exactly_the_region(read: Read) -> None:
    remote = np.random.default_rng(1).integers(0, 256, read.source.total_bytes, dtype=np.uint8)
    local = np.random.default_rng(2).integers(0, 256, read.target.total_bytes, dtype=np.uint8)
    expected = by_block(read.target, local.copy()).copy()
    where = (list(read.filled.blocks), slice(*read.filled.layers), slice(None), slice(*read.filled.heads))
    wanted = bytes_of(read.source, read.taken, remote)
    expected[where] = wanted

    plan = plan_read(read.source, read.taken, read.target, read.filled)
    for at, to, length in zip(plan.remote.tolist(), plan.local.tolist(), plan.lengths.tolist(), strict=True):
        local[to : to + length] = remote[at : at + length]

    assert plan.num_bytes == wanted.size
    np.testing.assert_array_equal(by_block(read.target, local), expected)


@given(reads())
def test_canonical_spans_name_the_bytes_of_a_region_in_order(read: Read) -> None:
    memory = np.random.default_rng(3).integers(0, 256, read.source.total_bytes, dtype=np.uint8)
    offsets, lengths = canonical_spans(read.source, read.taken)
    joined = b"".join(memory[o : o + n].tobytes() for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True))
    assert joined == bytes_of(read.source, read.taken, memory).tobytes()


@pytest.mark.parametrize("order", KVOrder)
def test_adjacent_blocks_become_one_span_per_contiguous_run(order: KVOrder) -> None:
    layout = kv_layout(16, order)
    runs = 1 if order is KVOrder.BLOCK_MAJOR else layout.group.num_layers
    taken = layout.whole_blocks((3, 4, 5))
    adjacent = plan_read(layout, taken, layout, layout.whole_blocks((9, 10, 11)))
    assert len(adjacent.lengths) == runs
    apart = plan_read(layout, taken, layout, layout.whole_blocks((9, 11, 10)))
    assert len(apart.lengths) == 3 * runs


@pytest.mark.parametrize(
    ("source_blocks", "target_blocks"),
    [((1, 2), (1,)), ((), ()), ((1, 2), (5, 5)), ((16,), (1,)), ((1,), (16,)), ((-1,), (1,)), ((1,), (-1,))],
)
def test_lists_that_do_not_pair_up_or_leave_the_memory_are_refused(
    source_blocks: tuple[int, ...], target_blocks: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="block"):
        plan_read(LAYOUT, LAYOUT.whole_blocks(source_blocks), LAYOUT, LAYOUT.whole_blocks(target_blocks))


@pytest.mark.parametrize(
    ("taken", "filled"),
    [((0, 1), (0, 2)), ((1, 3), (0, 2)), ((-1, 1), (0, 2)), ((1, 1), (1, 1)), ((0, 2), (2, 4))],
)
def test_heads_that_do_not_pair_up_or_are_not_there_are_refused(
    taken: tuple[int, int], filled: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="heads"):
        plan_read(LAYOUT, LAYOUT.heads_of((1,), taken), LAYOUT, LAYOUT.heads_of((2,), filled))
