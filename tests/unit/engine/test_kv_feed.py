"""Readers of an engine's KV events see every change, in order, or start over with everything."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.blocks import BlockHash, KVSnapshot
from pdserve.engine.kv_feed import KVFeed, KVReader
from pdserve.kvcache.prefix_cache import PrefixCache
from pdserve.router.kv_index import KVIndex


def name(number: int) -> BlockHash:
    return number.to_bytes(16, "big")


def feed_of(cache: PrefixCache, max_hashes: int = 65_536) -> KVFeed:
    return KVFeed(cache.drain_events, lambda: (cache.last_number, cache.held()), max_hashes=max_hashes)


class Follower:
    """A router's index at the end of one reader."""

    def __init__(self, feed: KVFeed) -> None:
        self.reader = KVReader(feed)
        self.index = KVIndex()
        self.snapshots = 0

    def follow(self) -> None:
        for item in self.reader.news():
            if isinstance(item, KVSnapshot):
                self.snapshots += item.last
                self.index.restore(("e", 1), item)
            else:
                assert self.index.apply(("e", 1), [item])

    def holds(self, block_hash: BlockHash) -> bool:
        return bool(self.index.match([block_hash], 0.0))


Actions = st.lists(st.tuples(st.sampled_from(["store", "forget", "read a", "read b"]), st.integers(0, 9)), max_size=60)


@settings(deadline=None)
@given(Actions, st.integers(1, 12))
def test_every_reader_ends_up_with_what_the_cache_holds(actions: list[tuple[str, int]], max_hashes: int) -> None:
    cache = PrefixCache()
    feed = feed_of(cache, max_hashes)
    followers = {"read a": Follower(feed), "read b": Follower(feed)}
    for action, block in actions:
        if action == "store":
            cache.insert([name(block)], [block])
        elif action == "forget":
            cache.forget([block])
        else:
            followers[action].follow()
    for follower in followers.values():
        follower.follow()
        assert [follower.holds(name(block)) for block in range(10)] == [
            cache.hash_of(block) is not None for block in range(10)
        ]


def test_a_reader_that_keeps_up_gets_one_snapshot_and_one_that_falls_behind_another() -> None:
    cache = PrefixCache()
    feed = feed_of(cache, max_hashes=4)
    quick, slow = Follower(feed), Follower(feed)
    slow.follow()
    for block in range(20):
        cache.insert([name(block)], [block])
        quick.follow()
    slow.follow()
    assert (quick.snapshots, slow.snapshots) == (1, 2)
    assert len(quick.index) == len(slow.index) == 20


def test_a_large_cache_is_sent_in_parts() -> None:
    cache = PrefixCache()
    cache.insert([name(block) for block in range(40_000)], range(40_000))
    parts = list(feed_of(cache).snapshot())
    assert [(len(part.hashes), part.first, part.last) for part in parts] == [
        (16_384, True, False),
        (16_384, False, False),
        (7_232, False, True),
    ]
    assert {part.number for part in parts} == {1}


def test_an_unread_feed_stays_bounded() -> None:
    cache = PrefixCache()
    feed = feed_of(cache, max_hashes=10)
    for block in range(100):
        cache.insert([name(block)], [block])
        feed.collect()
    assert len(feed.after(90) or []) == 10
    assert feed.after(89) is None


def test_a_reader_that_missed_something_gets_that_alone_while_it_is_kept() -> None:
    cache = PrefixCache()
    feed = feed_of(cache, max_hashes=4)
    follower = Follower(feed)
    follower.follow()
    for block in range(3):
        cache.insert([name(block)], [block])
    known = cache.last_number - 2
    follower.reader.news()  # lost on the way
    follower.reader.resume(known)
    assert [item.number for item in follower.reader.news()] == [known + 1, known + 2]
    for gone_or_never in (None, known - 5, cache.last_number + 1):
        follower.reader.resume(gone_or_never)
        assert all(isinstance(item, KVSnapshot) for item in follower.reader.news())
