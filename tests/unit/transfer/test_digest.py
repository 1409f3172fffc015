"""Digests: equal bytes in equal order, nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.layout import KVLayout, KVOrder
from pdserve.transfer.digest import DigestKind, digest_kind, region_digest, zero_tail
from pdserve.transfer.memory import HostMemory, KVMemory, TensorMemory
from tests.kv_layouts import by_block, kv_layout

BLOCKS = (2, 5, 3)


def digest(
    memory: KVMemory, layout: KVLayout, blocks: tuple[int, ...], seed: int, kind: DigestKind = DigestKind.XXH3
) -> bytes:
    """Of whole blocks."""
    return region_digest(memory, layout, layout.whole_blocks(blocks), seed, kind)


def filled(layout: KVLayout, seed: int = 1) -> HostMemory:
    """A memory whose blocks hold the same bytes in every order."""
    memory = HostMemory(layout.total_bytes)
    blocks = by_block(layout, memory.array)
    blocks[...] = np.random.default_rng(seed).integers(0, 256, blocks.shape, dtype=np.uint8)
    return memory


@pytest.mark.parametrize("kind", DigestKind)
def test_equal_blocks_have_equal_digests_in_both_orders(kind: DigestKind) -> None:
    digests = {digest(filled(kv_layout(8, order)), kv_layout(8, order), BLOCKS, 7, kind) for order in KVOrder}
    assert len(digests) == 1
    assert len(digests.pop()) == 16


@pytest.mark.parametrize("kind", DigestKind)
def test_order_of_blocks_and_seed_change_the_digest(kind: DigestKind) -> None:
    layout = kv_layout(8)
    memory = filled(layout)
    digests = {
        digest(memory, layout, blocks, seed, kind) for blocks in (BLOCKS, BLOCKS[::-1]) for seed in (7, 2**64 - 1)
    }
    assert len(digests) == 4


@given(order=st.sampled_from(KVOrder), kind=st.sampled_from(DigestKind), place=st.integers(0), bit=st.integers(0, 7))
def test_any_bit_of_the_blocks_changes_the_digest_and_no_other_does(
    order: KVOrder, kind: DigestKind, place: int, bit: int
) -> None:
    layout = kv_layout(8, order)
    memory = filled(layout)
    before = digest(memory, layout, BLOCKS, 7, kind)
    offset = place % layout.total_bytes
    offsets = by_block(layout, np.arange(layout.total_bytes))
    inside = offset in offsets[list(BLOCKS)]
    memory.array[offset] ^= 1 << bit
    assert (digest(memory, layout, BLOCKS, 7, kind) != before) == inside


def test_host_memory_is_digested_with_xxh3() -> None:
    layout = kv_layout(8)
    assert digest_kind(filled(layout), layout) is DigestKind.XXH3


@pytest.mark.parametrize("order", KVOrder)
def test_heads_have_the_digest_they_have_in_a_memory_of_their_own(order: KVOrder) -> None:
    both = kv_layout(8, order)
    memory = filled(both)
    one = kv_layout(8, KVOrder.LAYER_MAJOR).of_heads((1, 2))
    alone = HostMemory(one.total_bytes)
    by_block(one, alone.array)[...] = by_block(both, memory.array)[:, :, :, 1:2]
    expected = digest(alone, one, BLOCKS, 7)
    assert region_digest(memory, both, both.heads_of(BLOCKS, (1, 2)), 7) == expected
    assert region_digest(memory, both, both.heads_of(BLOCKS, (0, 1)), 7) != expected


@pytest.mark.parametrize("order", KVOrder)
def test_tail_slots_are_zeroed_and_used_slots_kept(order: KVOrder) -> None:
    layout = kv_layout(8, order)
    memory = filled(layout)
    expected = by_block(layout, memory.array).copy()
    expected[BLOCKS[-1], :, :, :, 1:] = 0
    zero_tail(memory, layout, BLOCKS, 9)
    np.testing.assert_array_equal(by_block(layout, memory.array), expected)
    zero_tail(memory, layout, BLOCKS[:2], 8)
    np.testing.assert_array_equal(by_block(layout, memory.array), expected)


@pytest.mark.parametrize("num_tokens", [0, 8, 13])
def test_token_counts_that_do_not_end_in_the_last_block_are_refused(num_tokens: int) -> None:
    layout = kv_layout(8)
    with pytest.raises(ValueError, match="do not end in the last"):
        zero_tail(filled(layout), layout, BLOCKS, num_tokens)


@pytest.mark.parametrize("order", KVOrder)
def test_memory_that_torch_allocated_digests_and_zeroes_like_host_memory(order: KVOrder) -> None:
    layout = kv_layout(8, order)
    host = filled(layout)
    tensor = torch.from_numpy(host.array.copy())
    foreign = TensorMemory(tensor)
    assert digest(foreign, layout, BLOCKS, 7) == digest(host, layout, BLOCKS, 7)
    for memory in (host, foreign):
        zero_tail(memory, layout, BLOCKS, 10)
    np.testing.assert_array_equal(tensor.numpy(), host.array)
    assert foreign.address == tensor.data_ptr()


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        TensorMemory(torch.zeros(4, 4, dtype=torch.uint8))
