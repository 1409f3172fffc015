from pdserve.core.blocks import KVEvent, KVEventKind, Tier
from pdserve.core.tiers import TierNews
from pdserve.kvcache.prefix_cache import PrefixCache
from pdserve.kvcache.tier_index import TierIndex

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def test_lookup_ends_at_the_first_gap() -> None:
    cache = PrefixCache()
    cache.insert([A, C], [5, 7])
    assert cache.lookup([A, B, C]) == (5,)
    assert cache.lookup([B]) == ()


def test_a_second_block_with_the_same_tokens_stays_anonymous() -> None:
    cache = PrefixCache()
    assert cache.insert([A], [1]) == [1]
    assert cache.insert([A, B], [2, 3]) == [3]
    assert cache.lookup([A, B]) == (1, 3)
    assert cache.hash_of(2) is None
    cache.check()


def test_events_tell_where_a_block_lies_at_the_nearest() -> None:
    index = TierIndex()
    cache = PrefixCache(index)

    def hear(block_hash: bytes, tier: Tier | None) -> None:
        cache.hear(TierNews(changes=((block_hash, tier),), tallies=()))

    cache.insert([A], [1])
    hear(A, Tier.HOST)
    cache.forget([1])
    hear(A, Tier.HOST)
    hear(A, Tier.DISK)
    cache.insert([A], [2])
    hear(A, None)
    cache.forget([2])
    hear(B, Tier.DISK)
    assert [(event.kind, event.tier) for event in cache.drain_events()] == [
        (KVEventKind.STORED, None),
        (KVEventKind.STORED, Tier.HOST),
        (KVEventKind.STORED, Tier.DISK),
        (KVEventKind.STORED, None),
        (KVEventKind.REMOVED, None),
        (KVEventKind.STORED, Tier.DISK),
    ]
    assert cache.held() == {None: (), Tier.HOST: (), Tier.DISK: (B,)}


def test_events_tell_every_change_and_count_from_one_without_gaps() -> None:
    cache = PrefixCache()
    cache.insert([A, B], [1, 2])
    cache.insert([A], [3])
    cache.forget([3, 9])
    cache.forget([2])
    assert cache.drain_events() == [
        KVEvent(number=1, kind=KVEventKind.STORED, hashes=(A, B)),
        KVEvent(number=2, kind=KVEventKind.REMOVED, hashes=(B,)),
    ]
    assert cache.drain_events() == []
    cache.insert([C], [2])
    assert cache.drain_events() == [KVEvent(number=3, kind=KVEventKind.STORED, hashes=(C,))]
    cache.check()
