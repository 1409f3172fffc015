"""The block manager against a model that remembers what each block really contains."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.blocks import BlockHash, KVEventKind, block_hashes
from pdserve.core.tiers import Tier, TierNews
from pdserve.kvcache.manager import KVCacheManager
from pdserve.kvcache.tier_index import TierIndex
from tests.unit.kvcache.owners import Owner

NUM_BLOCKS = 10
SIZE = 2

Content = tuple[bytes, tuple[int, ...]]
"""Salt, and all tokens up to the end of the block."""


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tiers = TierIndex()
        self.manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=SIZE, tiers=self.tiers)
        self.saves: list[tuple[BlockHash, int]] = []
        self.owners: dict[int, Owner] = {}
        self.computed: dict[int, int] = {}
        self.contents: dict[int, Content] = {}
        self.freed_at: dict[int, int] = {}
        self.tickets: dict[str, tuple[int, ...]] = {}
        self.quarantined: set[int] = set()
        self.borrowed: list[int] = []
        self.index: dict[BlockHash, Tier | None] = {}
        self.last_event = 0
        self.next_id = 0
        self.submitted = -1
        self.completed = -1

    def pick(self, choice: int) -> Owner:
        return list(self.owners.values())[choice % len(self.owners)]

    def adopt(self, owner: Owner, before: tuple[int, ...], upto: int) -> None:
        """New blocks of the owner must have been nobody's, not even a step's in flight."""
        for block_id in self.manager.block_ids(owner, upto)[len(before) :]:
            assert all(block_id not in blocks for blocks in self.tickets.values())
            assert block_id not in self.quarantined
            assert block_id not in self.borrowed
            assert all(block_id != saved for _, saved in self.saves)
            assert self.freed_at.get(block_id, -1) <= self.completed
            self.contents.pop(block_id, None)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        salt=st.sampled_from([b"x", b"x", b"y"]),
        full=st.booleans(),
    )
    def open(self, prompt: list[int], salt: bytes, full: bool) -> None:
        owner = Owner(self.next_id, prompt, salt)
        hit = self.manager.match(owner, len(prompt) if full else len(prompt) - 1)
        for index, block_id in enumerate(hit):
            assert self.contents[block_id] == (salt, tuple(prompt[: (index + 1) * SIZE]))
        free = self.manager.counts().free
        if not self.manager.allocate(owner, len(prompt), hit):
            assert self.manager.counts().free == free
            return
        self.next_id += 1
        self.owners[owner.sequence_id] = owner
        self.computed[owner.sequence_id] = len(hit) * SIZE
        self.adopt(owner, hit, len(prompt))

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0, 99), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, choice: int, tokens: list[int]) -> None:
        owner = self.pick(choice)
        upto = len(owner.token_ids) + len(tokens)
        before = self.manager.block_ids(owner, upto)
        if self.manager.allocate(owner, upto):
            owner.token_ids += tokens
            self.adopt(owner, before, upto)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0, 99), count=st.integers(1, 5))
    def compute(self, choice: int, count: int) -> None:
        owner = self.pick(choice)
        upto = min(len(owner.token_ids), self.computed[owner.sequence_id] + count)
        for index, block_id in enumerate(self.manager.block_ids(owner, upto)):
            if (index + 1) * SIZE > self.computed[owner.sequence_id]:
                end = min((index + 1) * SIZE, upto)
                self.contents[block_id] = (owner.salt, tuple(owner.token_ids[:end]))
        self.computed[owner.sequence_id] = upto
        self.manager.commit(owner, upto)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0, 99))
    def free(self, choice: int) -> None:
        owner = self.pick(choice)
        for block_id in self.manager.block_ids(owner, len(owner.token_ids)):
            self.freed_at[block_id] = self.submitted
        self.manager.free(owner, self.submitted)
        self.manager.free(owner, self.submitted)
        del self.owners[owner.sequence_id]

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0, 99))
    def lease(self, choice: int) -> None:
        owner = self.pick(choice)
        ticket_id = f"t{len(self.tickets)}-{self.next_id}-{choice}"
        if ticket_id not in self.tickets:
            self.tickets[ticket_id] = self.manager.lease(owner, ticket_id, len(owner.token_ids))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=2, max_size=9),
        salt=st.sampled_from([b"x", b"x", b"y"]),
        first=st.integers(0, 2),
    )
    def lend(self, tokens: list[int], salt: bytes, first: int) -> None:
        """A run of the chain from any block on, of what is computed and nothing else, a quarter of the pool at most."""
        hashes = block_hashes(tokens, SIZE, Owner(-1, tokens, salt).namespace)[first:]
        ticket_id = f"l{len(self.tickets)}-{self.next_id}-{self.last_event}-{tokens}-{first}-{salt!r}"
        if ticket_id in self.tickets:
            return
        blocks = self.manager.lend(ticket_id, hashes)
        for index, block_id in enumerate(blocks, first):
            assert self.contents[block_id] == (salt, tuple(tokens[: (index + 1) * SIZE]))
        if blocks:
            self.tickets[ticket_id] = blocks
        else:
            assert not self.manager.release(ticket_id)
        lent = [blocks for name, blocks in self.tickets.items() if name.startswith("l")]
        assert sum(map(len, lent)) <= NUM_BLOCKS // 4

    @precondition(lambda self: self.tickets)
    @rule(choice=st.integers(0, 99))
    def release(self, choice: int) -> None:
        ticket_id = list(self.tickets)[choice % len(self.tickets)]
        del self.tickets[ticket_id]
        assert self.manager.release(ticket_id)
        assert not self.manager.release(ticket_id)

    @precondition(lambda self: self.owners)
    @rule(choice=st.integers(0, 99))
    def fail_fetch(self, choice: int) -> None:
        """Nothing was computed or verified in the blocks that were not hit: they go to quarantine."""
        owner = self.pick(choice)
        computed = self.computed[owner.sequence_id]
        if computed % SIZE:
            return
        blocks = self.manager.block_ids(owner, len(owner.token_ids))[computed // SIZE :]
        fresh = [b for b in blocks if b not in self.quarantined]
        self.manager.quarantine(fresh)
        self.quarantined |= set(fresh)
        self.free(choice)

    @precondition(lambda self: self.quarantined)
    @rule(count=st.integers(1, 4))
    def settle(self, count: int) -> None:
        settled = sorted(self.quarantined)[:count]
        self.manager.unquarantine(settled)
        self.quarantined -= set(settled)

    @rule(choice=st.integers(0, 99), tier=st.sampled_from([*Tier, None]))
    def finish_save(self, choice: int, tier: Tier | None) -> None:
        """A copy is done, and the block ends up in a tier, or in none."""
        self.take_saves()
        if self.saves:
            block_hash, block_id = self.saves.pop(choice % len(self.saves))
            self.manager.hear(TierNews(changes=((block_hash, tier),), tallies=()))
            self.manager.saved([block_id])

    def take_saves(self) -> None:
        blocks, _, _ = self.manager.take_saves()
        for block_hash, block_id in blocks:
            assert self.tiers.where(block_hash) is not Tier.HOST
            assert block_id in self.contents
        self.saves += blocks

    @rule(most=st.integers(0, 40))
    def borrow(self, most: int) -> None:
        free = self.manager.counts().free
        blocks = self.manager.borrow(most)
        assert len(blocks) <= min(most, free // 8)
        for block_id in blocks:
            assert self.freed_at.get(block_id, -1) <= self.completed
            self.contents.pop(block_id, None)
        self.borrowed += blocks

    @precondition(lambda self: self.borrowed)
    @rule(count=st.integers(1, 4))
    def give_back(self, count: int) -> None:
        given, self.borrowed = self.borrowed[:count], self.borrowed[count:]
        free = self.manager.counts().free
        self.manager.give_back(given)
        assert self.manager.counts().free == free + len(given)

    @rule()
    def submit(self) -> None:
        self.submitted += 1

    @precondition(lambda self: self.completed < self.submitted)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.manager.completed(self.completed)

    @invariant()
    def bookkeeping_holds(self) -> None:
        self.manager.check()
        counts = self.manager.counts()
        assert counts.quarantined == len(self.quarantined)
        self.take_saves()
        leased = {b for blocks in self.tickets.values() for b in blocks} | {b for _, b in self.saves}
        assert counts.leased == len(leased - self.quarantined)

    @invariant()
    def shared_blocks_hold_one_content(self) -> None:
        seen: dict[int, Content] = {}
        for owner in self.owners.values():
            for index, block_id in enumerate(self.manager.block_ids(owner, len(owner.token_ids))):
                content = (owner.salt, tuple(owner.token_ids[: (index + 1) * SIZE]))
                assert seen.setdefault(block_id, content) == content

    @invariant()
    def events_replay_to_the_cache(self) -> None:
        for event in self.manager.drain_events():
            self.last_event += 1
            assert event.number == self.last_event
            if event.kind is KVEventKind.STORED:
                assert all(self.index.get(found, "nowhere") is not event.tier for found in event.hashes)
                self.index |= dict.fromkeys(event.hashes, event.tier)
            else:
                for gone in event.hashes:
                    del self.index[gone]
        held = self.manager.snapshot()[1]
        assert self.index == {found: tier for tier, hashes in held.items() for found in hashes}

    def teardown(self) -> None:
        for owner in list(self.owners.values()):
            self.manager.free(owner, self.submitted)
        for ticket_id in list(self.tickets):
            self.manager.release(ticket_id)
        self.manager.give_back(self.borrowed)
        self.take_saves()
        self.manager.saved([block_id for _, block_id in self.saves])
        self.manager.unquarantine(sorted(self.quarantined))
        self.manager.completed(self.submitted)
        assert self.manager.counts().free == NUM_BLOCKS
        self.manager.check()


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
