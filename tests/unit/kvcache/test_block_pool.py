import pytest

from pdserve.core.endpoint import BlockCounts
from pdserve.kvcache.block_pool import BlockPool, BlockState


def cached(pool: BlockPool, count: int) -> list[int]:
    """Blocks that are free but hold cached KV, freed as one sequence."""
    blocks = pool.take(count)
    for block_id in blocks:
        pool.mark_cached(block_id)
    pool.free(blocks, after_step=-1)
    return blocks


def test_counts_one_state_per_block_by_precedence() -> None:
    pool = BlockPool(8)
    everything = pool.take(4)
    pool.lease(everything[:3])
    pool.quarantine(everything[:1])
    assert pool.counts() == BlockCounts(total=8, free=4, used=1, leased=2, quarantined=1)
    pool.free(everything, after_step=-1)
    assert pool.counts() == BlockCounts(total=8, free=5, used=0, leased=2, quarantined=1)
    pool.unquarantine(everything[:1])
    assert pool.counts() == BlockCounts(total=8, free=5, used=0, leased=3, quarantined=0)
    pool.unlease(everything[:3])
    assert pool.counts() == BlockCounts(total=8, free=8, used=0, leased=0, quarantined=0)
    pool.check()


def test_a_block_counts_as_used_until_the_steps_submitted_before_it_was_freed_have_completed() -> None:
    pool = BlockPool(1)
    pool.free(pool.take(1), after_step=4)
    pool.completed(3)
    assert pool.counts().used == 1
    assert pool.num_cooling == 1
    with pytest.raises(ValueError, match="0 are free"):
        pool.take(1)
    pool.completed(4)
    assert pool.counts().free == 1
    assert pool.take(1) == [0]


def test_a_released_block_still_waits_for_the_steps_in_flight() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.lease(blocks)
    pool.free(blocks, after_step=7)
    pool.unlease(blocks)
    assert pool.state(0) is BlockState.COOLING
    pool.completed(7)
    assert pool.state(0) is BlockState.FREE


def test_a_cooling_cached_block_taken_back_by_a_hit_is_not_freed_when_the_step_completes() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.mark_cached(0)
    pool.free(blocks, after_step=1)
    pool.reference(blocks)
    pool.completed(1)
    assert pool.state(0) is BlockState.USED
    pool.free(blocks, after_step=1)
    assert pool.state(0) is BlockState.FREE


def test_a_block_freed_again_waits_for_the_later_step() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.mark_cached(0)
    pool.free(blocks, after_step=1)
    pool.reference(blocks)
    pool.free(blocks, after_step=2)
    pool.completed(1)
    assert pool.state(0) is BlockState.COOLING
    pool.completed(2)
    assert pool.state(0) is BlockState.FREE


def test_one_block_stays_leased_until_its_last_ticket_is_released() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.lease(blocks)
    pool.lease(blocks)
    pool.free(blocks, after_step=-1)
    pool.unlease(blocks)
    assert pool.counts().leased == 1
    pool.unlease(blocks)
    assert pool.counts().free == 1


def test_blank_blocks_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(4)
    kept = cached(pool, 2)
    assert not set(pool.take(2)) & set(kept)


def test_cached_blocks_are_evicted_least_recently_used_first() -> None:
    pool = BlockPool(3)
    first, second, third = (cached(pool, 1)[0] for _ in range(3))
    pool.reference([first])
    pool.free([first], after_step=-1)
    assert [pool.take(1)[0] for _ in range(3)] == [second, third, first]


def test_later_blocks_of_a_sequence_are_evicted_before_earlier_ones() -> None:
    pool = BlockPool(3)
    first, second, third = cached(pool, 3)
    assert [pool.take(1)[0] for _ in range(3)] == [third, second, first]


def test_later_blocks_of_a_released_lease_are_evicted_before_earlier_ones() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block_id in blocks:
        pool.mark_cached(block_id)
    pool.lease(blocks)
    pool.free(blocks, after_step=-1)
    pool.unlease(blocks)
    assert [pool.take(1)[0] for _ in range(3)] == blocks[::-1]


def test_a_block_handed_out_again_is_no_longer_cached() -> None:
    pool = BlockPool(1)
    (block_id,) = cached(pool, 1)
    pool.take(1)
    with pytest.raises(ValueError, match="not cached"):
        pool.reference([block_id])


def test_misuse_is_refused_and_says_why() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="block 0 cannot be freed: no sequence holds it"):
        pool.free([0], after_step=-1)
    with pytest.raises(ValueError, match="leased: no sequence"):
        pool.lease([0])
    with pytest.raises(ValueError, match="not leased"):
        pool.unlease([0])
    with pytest.raises(ValueError, match="quarantined: no sequence"):
        pool.quarantine([0])
    with pytest.raises(ValueError, match="not quarantined"):
        pool.unquarantine([0])
    blocks = pool.take(1)
    pool.quarantine(blocks)
    with pytest.raises(ValueError, match="it already is"):
        pool.quarantine(blocks)
    with pytest.raises(ValueError, match="cached: it is quarantined"):
        pool.mark_cached(blocks[0])
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)
    pool.check()
