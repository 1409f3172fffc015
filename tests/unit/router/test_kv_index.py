"""KVIndex says exactly what the engines' events said, whatever is lost, repeated or restarted."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.core.blocks import BlockHash, KVEvent, KVEventKind, KVSnapshot, Tier, block_hashes
from pdserve.core.cluster import EngineKey
from pdserve.router.kv_index import BlockHit, KVIndex

CHAINS = tuple(
    tuple(block_hashes(tokens, 1, bytes(32))) for tokens in ((1, 2, 3, 4), (1, 2, 5, 6), (1, 7, 8), (9, 9, 9, 9))
)
HASHES = tuple(sorted({block_hash for chain in CHAINS for block_hash in chain}))
ENGINES = ("a", "b", "c")
Hashes = st.sets(st.sampled_from(HASHES), min_size=1).map(tuple)
Engine = st.sampled_from(ENGINES)


def stored(number: int, *hashes: BlockHash) -> KVEvent:
    return KVEvent(number=number, kind=KVEventKind.STORED, hashes=hashes)


def snapshot(number: int, *hashes: BlockHash) -> KVSnapshot:
    return KVSnapshot(number=number, hashes=hashes, first=True, last=True)


Held = dict[BlockHash, Tier | None]


class Sender:
    """An engine's cache, and what of its events the index must have taken in."""

    def __init__(self, name: str, epoch: int) -> None:
        self.key: EngineKey = (name, epoch)
        self.held: Held = {}
        self.number = 0
        self.unsent: list[KVEvent] = []
        self.taken: Held = {}
        self.taken_number: int | None = None
        self.seen = 0

    @property
    def lost(self) -> bool:
        """Whether events are missing before one that came."""
        return self.taken_number is None or self.seen > self.taken_number

    def change(self, kind: KVEventKind, hashes: tuple[BlockHash, ...], tier: Tier | None) -> None:
        """An engine stores no block without those before it, and keeps none longer than they."""
        if kind is not KVEventKind.CLEARED:
            hashes = tuple({near for block in hashes for near in _kin(block, later=kind is KVEventKind.REMOVED)})
        self.number += 1
        self.unsent.append(KVEvent(number=self.number, kind=kind, hashes=hashes, tier=tier))
        self.held = _after(self.held, self.unsent[-1])

    def take(self, events: list[KVEvent]) -> bool:
        """What the index ought to do with them, and whether it ought to be content."""
        for event in events:
            if self.taken_number is None or event.number > self.taken_number + 1:
                self.seen = max(self.seen, events[-1].number)
                return False
            if event.number == self.taken_number + 1:
                self.taken = _after(self.taken, event)
                self.taken_number = event.number
        return True


def _kin(block: BlockHash, *, later: bool) -> set[BlockHash]:
    """The block, and those after or before it in any chain."""
    places = [(chain, chain.index(block)) for chain in CHAINS if block in chain]
    return {near for chain, at in places for near in (chain[at:] if later else chain[: at + 1])}


def _after(held: Held, event: KVEvent) -> Held:
    match event.kind:
        case KVEventKind.STORED:
            return held | dict.fromkeys(event.hashes, event.tier)
        case KVEventKind.REMOVED:
            return {block_hash: tier for block_hash, tier in held.items() if block_hash not in event.hashes}
        case _:
            return {}


class IndexMachine(RuleBasedStateMachine):
    """Three engines tell of their caches over a line that loses, repeats and reorders."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KVIndex()
        self.epochs = 0
        self.senders: dict[str, Sender] = {}
        for name in ENGINES:
            self.restart(name)

    @rule(name=Engine)
    def restart(self, name: str) -> None:
        if old := self.senders.get(name):
            self.index.drop(old.key)
        self.epochs += 1
        self.senders[name] = Sender(name, self.epochs)

    @rule(name=Engine, kind=st.sampled_from(KVEventKind), hashes=Hashes, tier=st.sampled_from([None, *Tier]))
    def change(self, name: str, kind: KVEventKind, hashes: tuple[BlockHash, ...], tier: Tier | None) -> None:
        self.senders[name].change(kind, () if kind is KVEventKind.CLEARED else hashes, tier)

    @rule(name=Engine, count=st.integers(1, 4), keep=st.booleans())
    def deliver(self, name: str, count: int, keep: bool) -> None:
        """keep: the same events will come again."""
        sender = self.senders[name]
        events = sender.unsent[:count]
        if not keep:
            del sender.unsent[:count]
        assert self.index.apply(sender.key, events) is sender.take(events)

    @rule(name=Engine)
    def lose(self, name: str) -> None:
        self.senders[name].unsent[:1] = []

    @rule(name=Engine)
    def swap(self, name: str) -> None:
        unsent = self.senders[name].unsent
        unsent[:2] = unsent[:2][::-1]

    @rule(name=Engine, cut=st.integers(0, len(HASHES)))
    def resend(self, name: str, cut: int) -> None:
        sender = self.senders[name]
        parts: list[tuple[Tier | None, tuple[BlockHash, ...]]] = []
        for tier in (None, *Tier):
            hashes = tuple(sorted(found for found, place in sender.held.items() if place is tier))
            parts += [(tier, hashes[:cut]), (tier, hashes[cut:])]
        for number, (tier, part) in enumerate(parts):
            first, last = number == 0, number == len(parts) - 1
            self.index.restore(
                sender.key, KVSnapshot(number=sender.number, hashes=part, first=first, last=last, tier=tier)
            )
        sender.taken, sender.taken_number, sender.seen = dict(sender.held), sender.number, 0

    @invariant()
    def knows_what_came_last(self) -> None:
        for sender in self.senders.values():
            assert self.index.last_number(sender.key) == sender.taken_number

    @invariant()
    def matches_what_was_taken_in(self) -> None:
        for chain in CHAINS:
            expected = {
                sender.key: BlockHit(0, depth)
                if sender.lost
                else BlockHit(depth, depth, *(_count(chain[:depth], sender.taken, tier) for tier in Tier))
                for sender in self.senders.values()
                if (depth := _depth(chain, sender.taken))
            }
            assert self.index.match(chain, 0.0) == expected

    @invariant()
    def counts_what_was_taken_in(self) -> None:
        assert len(self.index) == sum(len(sender.taken) for sender in self.senders.values())


def _count(chain: Sequence[BlockHash], held: Held, tier: Tier) -> int:
    return sum(held[block_hash] is tier for block_hash in chain)


def _depth(chain: tuple[BlockHash, ...], held: Held) -> int:
    return next((depth for depth, block_hash in enumerate(chain) if block_hash not in held), len(chain))


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_index_against_sets = IndexMachine.TestCase


def test_nothing_is_taken_in_before_the_first_snapshot() -> None:
    index = KVIndex()
    assert not index.apply(("a", 1), [stored(1, HASHES[0])])
    assert len(index) == 0
    index.restore(("a", 1), snapshot(1, HASHES[0]))
    assert index.apply(("a", 1), [stored(2, HASHES[1])])
    assert len(index) == 2


def test_while_events_are_missing_what_was_known_is_likely_and_no_more() -> None:
    index = KVIndex()
    index.restore(("a", 1), snapshot(0, *CHAINS[0]))
    assert index.match(CHAINS[0], 0.0) == {("a", 1): BlockHit(4, 4)}
    assert not index.apply(("a", 1), [stored(5, HASHES[-1])])
    assert index.match(CHAINS[0], 0.0) == {("a", 1): BlockHit(0, 4)}
    for number in range(1, 5):
        assert index.apply(("a", 1), [stored(number, HASHES[-1])])
        assert index.match(CHAINS[0], 0.0) == {("a", 1): BlockHit(0, 4)}
    assert index.apply(("a", 1), [stored(5, HASHES[-1])])
    assert index.match(CHAINS[0], 0.0) == {("a", 1): BlockHit(4, 4)}
    assert not index.apply(("a", 1), [stored(9, HASHES[-1])])
    index.restore(("a", 1), snapshot(9, *CHAINS[0][:2]))
    assert index.match(CHAINS[0], 0.0) == {("a", 1): BlockHit(2, 2)}


def test_a_dropped_incarnation_is_forgotten_at_once_and_its_memory_later() -> None:
    index = KVIndex()
    chain = tuple(block_hashes(range(5000), 1, bytes(32)))
    index.restore(("a", 1), snapshot(0, *chain))
    index.drop(("a", 1))
    index.restore(("a", 2), snapshot(0))
    assert index.match(chain, 0.0) == {}
    for _ in range(6):
        index.apply(("a", 2), [])
    assert index._holders == {}
    index.restore(("b", 1), snapshot(0, *chain[:2]))
    assert index.match(chain, 0.0) == {("b", 1): BlockHit(2, 2)}


def test_what_was_just_dispatched_is_likely_for_a_while() -> None:
    index = KVIndex(patience=10.0)
    chain = CHAINS[0]
    index.restore(("a", 1), snapshot(0, chain[0]))
    index.restore(("b", 1), snapshot(0))
    index.expect(("b", 1), chain[:3], now=100.0)
    assert index.match(chain, 105.0) == {("a", 1): BlockHit(1, 1), ("b", 1): BlockHit(0, 3)}
    assert index.match(chain, 110.0) == {("a", 1): BlockHit(1, 1)}


def test_what_an_engine_has_announced_is_expected_of_it_no_longer() -> None:
    index, chain = KVIndex(), CHAINS[0]
    index.restore(("a", 1), snapshot(0))
    index.expect(("a", 1), chain, now=0.0)
    assert index.apply(("a", 1), [stored(1, *chain)])
    index.expect(("a", 1), chain, now=1.0)
    assert index.num_expected == 0
    assert index.apply(("a", 1), [KVEvent(number=2, kind=KVEventKind.REMOVED, hashes=chain[1:])])
    assert index.match(chain, 2.0) == {("a", 1): BlockHit(1, 1)}


def test_what_will_not_come_is_expected_no_longer_unless_somebody_else_expects_it() -> None:
    index, chain = KVIndex(), CHAINS[0]
    for name in "ab":
        index.expect((name, 1), chain, now=0.0)
    index.expect(("a", 1), chain[:2], now=1.0)
    index.retract(("a", 1), chain, since=0.0)
    assert index.match(chain, 2.0) == {("a", 1): BlockHit(0, 2), ("b", 1): BlockHit(0, 4)}
    index.retract(("c", 1), chain, since=0.0)
    index.retract(("a", 1), chain, since=1.0)
    assert index.match(chain, 2.0) == {("b", 1): BlockHit(0, 4)}


def test_expectations_and_entries_are_bounded() -> None:
    index = KVIndex(max_blocks=3, max_expected=2)
    older, newer = CHAINS[0][:2], CHAINS[3][:3]
    index.restore(("a", 1), snapshot(0, *older))
    index.restore(("b", 1), snapshot(0))
    assert index.apply(("a", 1), [stored(1, *newer)])
    assert index.match(older, 0.0) == {}
    assert index.match(newer, 0.0) == {("a", 1): BlockHit(3, 3)}
    assert (len(index), index.num_forgotten, index.held_by(("a", 1))) == (3, 2, 3)
    assert index.apply(("b", 1), [stored(1, older[0])])
    assert index.match(older, 0.0) == {("b", 1): BlockHit(1, 1)}
    assert (len(index), index.num_forgotten, index.held_by(("a", 1))) == (3, 3, 2)
    index.expect(("b", 1), CHAINS[1], now=0.0)
    assert index.num_expected == 2
    assert index.match(CHAINS[1][2:], 0.0) == {("b", 1): BlockHit(0, 2)}


def test_expectations_that_came_to_nothing_do_not_pile_up() -> None:
    index = KVIndex(patience=10.0)
    for second in range(100):
        index.expect(("a", 1), [second.to_bytes(16, "big")], now=float(second))
    assert index.num_expected == 10


def test_an_expectation_dies_with_its_engine() -> None:
    index = KVIndex()
    index.expect(("a", 1), CHAINS[0], now=0.0)
    index.drop(("a", 1))
    index.restore(("b", 1), snapshot(0))
    index.restore(("c", 1), snapshot(0))
    assert index.match(CHAINS[0], 0.0) == {}


@given(st.sets(st.integers(0, 19)))
def test_a_lost_block_in_the_middle_may_lengthen_a_prefix_but_nothing_shortens_it(held: set[int]) -> None:
    index = KVIndex()
    chain = tuple(block_hashes(range(20), 1, bytes(32)))
    index.restore(("a", 1), snapshot(0, *(chain[place] for place in held)))
    hit = index.match(chain, 0.0).get(("a", 1))
    unbroken = next(place for place in range(21) if place not in held)
    assert unbroken <= (hit.blocks if hit else 0) <= max(held, default=-1) + 1


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 20), max_size=60))
def test_one_walk_finds_every_engine(depths: dict[int, int]) -> None:
    index = KVIndex()
    chain = tuple(block_hashes(range(20), 1, bytes(32)))
    for engine, depth in depths.items():
        index.restore((f"e{engine}", 1), snapshot(0, *chain[:depth]))
    expected = {(f"e{engine}", 1): BlockHit(depth, depth) for engine, depth in depths.items() if depth}
    assert index.match(chain, 0.0) == expected
