import pytest

from pdserve.core.blocks import KVEventKind, block_hashes
from pdserve.core.tiers import Tier, TierNews
from pdserve.kvcache.manager import KVCacheManager
from pdserve.kvcache.tier_index import TierIndex
from tests.unit.kvcache.owners import Owner


def make_manager(num_blocks: int = 8, *, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=4, prefix_caching=prefix_caching)


def leave_cached(manager: KVCacheManager, owner: Owner) -> tuple[int, ...]:
    """Compute a whole sequence and let go of it; returns its blocks."""
    assert manager.allocate(owner, len(owner.token_ids))
    manager.commit(owner, len(owner.token_ids))
    blocks = manager.block_ids(owner, len(owner.token_ids))
    manager.free(owner, after_step=-1)
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    manager = make_manager(num_blocks=2)
    owner = Owner(1, list(range(12)))
    assert not manager.allocate(owner, 9)
    assert manager.counts().free == 2
    assert manager.allocate(owner, 8)
    assert not manager.allocate(owner, 9)
    assert len(manager.block_ids(owner, 8)) == 2
    manager.check()


def test_only_committed_whole_blocks_are_hit() -> None:
    manager = make_manager()
    first = Owner(1, list(range(10)))
    assert manager.allocate(first, 10)
    assert manager.match(Owner(2, list(range(10))), 9) == ()
    manager.commit(first, 7)
    assert manager.match(Owner(2, list(range(10))), 9) == manager.block_ids(first, 4)
    manager.commit(first, 10)
    assert manager.match(Owner(2, list(range(10))), 9) == manager.block_ids(first, 8)


def test_a_limit_below_the_block_end_leaves_the_block_out() -> None:
    manager = make_manager()
    blocks = leave_cached(manager, Owner(1, list(range(8))))
    assert manager.match(Owner(2, list(range(8))), 7) == blocks[:1]
    assert manager.match(Owner(2, list(range(8))), 8) == blocks


def test_another_salt_or_a_different_earlier_token_is_no_hit() -> None:
    manager = make_manager()
    leave_cached(manager, Owner(1, list(range(8)), salt=b"one"))
    assert manager.match(Owner(2, list(range(8)), salt=b"two"), 8) == ()
    assert manager.match(Owner(3, [9, *range(1, 8)], salt=b"one"), 8) == ()
    assert len(manager.match(Owner(4, list(range(8)), salt=b"one"), 8)) == 2


def test_free_blocks_a_hit_takes_back_are_not_counted_for_the_rest() -> None:
    manager = make_manager(num_blocks=3)
    leave_cached(manager, Owner(1, list(range(8))))
    owner = Owner(2, [*range(8), 50, 51, 52, 53, 54])
    hit = manager.match(owner, 12)
    assert len(hit) == 2
    assert not manager.allocate(owner, 13, hit)
    assert manager.counts().free == 3
    assert manager.allocate(owner, 12, hit)
    assert manager.block_ids(owner, 8) == hit
    manager.check()


def test_shared_blocks_survive_until_the_last_sequence_frees_them() -> None:
    manager = make_manager()
    first, second = Owner(1, list(range(9))), Owner(2, list(range(9)))
    assert manager.allocate(first, 9)
    manager.commit(first, 9)
    assert manager.allocate(second, 9, manager.match(second, 8))
    manager.free(first, after_step=-1)
    manager.check()
    assert manager.counts().used == 3
    manager.free(second, after_step=-1)
    assert manager.counts().free == 8


def test_eviction_is_announced_and_ends_the_hit() -> None:
    manager = make_manager(num_blocks=2)
    leave_cached(manager, Owner(1, list(range(8))))
    (stored,) = manager.drain_events()
    namespace = Owner(1, []).namespace
    assert stored.hashes == tuple(block_hashes(range(8), 4, namespace))
    assert manager.allocate(Owner(2, [30] * 4), 4)
    (removed,) = manager.drain_events()
    assert (removed.kind, removed.hashes, removed.number) == (KVEventKind.REMOVED, stored.hashes[1:], 2)
    assert len(manager.match(Owner(3, list(range(8))), 8)) == 1


def test_generated_tokens_are_published_too() -> None:
    manager = make_manager()
    first = Owner(1, list(range(6)))
    assert manager.allocate(first, 6)
    manager.commit(first, 6)
    first.token_ids += [20, 21, 22]
    assert manager.allocate(first, 9)
    manager.commit(first, 8)
    assert manager.match(Owner(2, [*range(6), 20, 21]), 8) == manager.block_ids(first, 8)


def test_a_lease_outlives_its_sequence_and_ends_once() -> None:
    manager = make_manager()
    owner = Owner(1, list(range(9)))
    assert manager.allocate(owner, 12)
    blocks = manager.lease(owner, "t", 9)
    assert blocks == manager.block_ids(owner, 9)
    with pytest.raises(ValueError, match="already has a lease"):
        manager.lease(owner, "t", 9)
    manager.free(owner, after_step=3)
    assert manager.counts().leased == 3
    assert manager.release("t")
    assert not manager.release("t")
    assert manager.counts().used == 3
    manager.completed(3)
    assert manager.counts().free == 8
    manager.check()


def test_two_tickets_of_one_prefix_share_blocks_and_one_release_keeps_the_other_leased() -> None:
    manager = make_manager()
    first, second = Owner(1, list(range(9))), Owner(2, list(range(9)))
    assert manager.allocate(first, 9)
    manager.commit(first, 9)
    shared = set(manager.lease(first, "one", 9)[:2])
    assert manager.allocate(second, 9, manager.match(second, 8))
    assert shared < set(manager.lease(second, "two", 9))
    manager.free(first, after_step=-1)
    manager.free(second, after_step=-1)
    assert manager.release("one")
    assert manager.counts().leased == 3
    assert manager.release("two")
    assert manager.counts().free == 8
    manager.check()


def test_quarantined_blocks_stay_away_until_they_come_back() -> None:
    manager = make_manager(num_blocks=3)
    owner = Owner(1, list(range(12)))
    assert manager.allocate(owner, 12)
    blocks = manager.block_ids(owner, 12)
    manager.quarantine(blocks[1:])
    manager.free(owner, after_step=-1)
    assert (manager.counts().free, manager.counts().quarantined) == (1, 2)
    assert not manager.allocate(Owner(2, list(range(8))), 8)
    manager.unquarantine(blocks[1:2])
    assert manager.allocate(Owner(2, list(range(8))), 8)
    manager.unquarantine(blocks[2:])
    manager.check()


def test_without_prefix_caching_nothing_is_hit_or_announced() -> None:
    manager = make_manager(prefix_caching=False)
    leave_cached(manager, Owner(1, list(range(8))))
    assert manager.match(Owner(2, list(range(8))), 8) == ()
    assert manager.drain_events() == []


def test_a_hit_for_a_sequence_that_has_blocks_is_refused() -> None:
    manager = make_manager()
    blocks = leave_cached(manager, Owner(1, list(range(8))))
    owner = Owner(2, list(range(8)))
    assert manager.allocate(owner, 4)
    with pytest.raises(ValueError, match="already has blocks"):
        manager.allocate(owner, 8, blocks)


def test_lent_blocks_are_kept_although_no_sequence_holds_them() -> None:
    manager = make_manager(num_blocks=8)
    owner = Owner(1, list(range(12)))
    blocks = leave_cached(manager, owner)
    assert manager.lend("loan", owner.block_hashes) == blocks[:2], "a quarter of the pool at most"
    assert (manager.counts().leased, manager.counts().free) == (2, 6)
    assert not manager.allocate(Owner(2, [7] * 28), 28)
    assert manager.lend("more", owner.block_hashes) == ()
    assert manager.release("loan")
    assert not manager.release("loan")
    assert manager.match(Owner(3, list(range(12))), 12) == blocks, "still cached"
    manager.check()


def test_a_loan_is_the_cached_run_from_the_first_block_asked_for() -> None:
    manager = make_manager(num_blocks=16)
    owner = Owner(1, list(range(12)))
    blocks = leave_cached(manager, owner)
    assert manager.lend("tail", owner.block_hashes[1:]) == blocks[1:]
    assert manager.lend("other", [b"?" * 16, *owner.block_hashes]) == ()
    with pytest.raises(ValueError, match="already has a lease"):
        manager.lend("tail", owner.block_hashes)
    manager.release("tail")
    assert manager.counts().free == 16


def test_kv_that_is_not_to_be_trusted_is_found_in_no_tier_whenever_the_tier_tells_of_it() -> None:
    manager = KVCacheManager(num_blocks=8, block_size=4, tiers=TierIndex())
    shared, owner = Owner(1, list(range(4))), Owner(2, list(range(12)))
    leave_cached(manager, shared)
    assert manager.allocate(owner, 12, manager.match(owner, 12))
    manager.commit(owner, 12)
    assert manager.allocate(Owner(3, list(range(4))), 4, manager.match(shared, 4))
    first, second, third = owner.block_hashes
    manager.hear(TierNews(changes=((first, Tier.HOST), (second, Tier.HOST)), tallies=()))
    manager.drain_events()
    manager.forget(owner)
    [event] = manager.drain_events()
    assert (event.kind, event.hashes, event.tier) == (KVEventKind.REMOVED, (second, third), None)
    manager.hear(TierNews(changes=((second, Tier.DISK), (third, Tier.HOST)), tallies=()))
    assert manager.drain_events() == []
    assert manager.continuation((second, third)) == (0, ())
    assert manager.match_tiers(owner, 0, 12) == (Tier.HOST,), "the block that others use is left alone"
    manager.check()
