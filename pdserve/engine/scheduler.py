"""Which tokens the next step computes. One policy for every role: num_computed_tokens chases num_tokens.

A step takes, within max_tokens_per_step tokens and max_rows rows, oldest arrival first:
1. running sequences with one token to go (decodes, and prompts about to end);
2. further chunks, of at most chunk_size tokens, of prompts already begun;
3. newly admitted sequences.

Admission is first come, first served and takes all blocks of the known tokens at once, so only decodes
ever grow. A sequence that does not fit yet stops admission for those behind it: nobody is overtaken, so a
large prompt cannot starve, and since everything that holds blocks ends by itself (running sequences by
their length, leases, fetches, restores and requests by their deadlines), nobody waits forever. Sequences with a
ticket queue alike, take blocks for what it may come to cover and one token, and no tokens of the step; so do those
whose prefix goes on in a tier or in another engine's cache, if restoring it from there is worth while, and they join
the prompts begun when it is here.

When a decode finds no block, the youngest arrival behind it that is running and has no ticket issued for its blocks
gives up its blocks and goes back to its place in the queue. Blocks cooling down behind a step in flight
are waited for first. So the oldest sequence always gets on. A preempted one does not come back at once:
it needs all the blocks it gave up, and the older one took some of them.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pdserve.core.batch import Row
from pdserve.core.endpoint import LEASED_WATERMARK, EngineLimits
from pdserve.core.ticket import KVSource
from pdserve.core.tiers import Tier
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.kvcache.manager import KVCacheManager

ChooseRestore = Callable[[Seq[Tier]], int]
"""Given the tiers of the blocks that continue a device hit: how many of them to restore."""

ChooseFetch = Callable[[KVSource, int], int]
"""Given a source and how many blocks that continue a device hit it should hold: how many to ask it for."""


@dataclass(slots=True)
class StepPlan:
    """What one call of schedule decided. Sequences appear in each list in scheduling order."""

    rows: list[Row] = field(default_factory=list)
    scheduled: list[Sequence] = field(default_factory=list)
    """The sequence of each row."""
    admitted: list[Sequence] = field(default_factory=list)
    fetching: list[Sequence] = field(default_factory=list)
    restoring: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """Preempted sequences whose sampler state the worker must drop."""
    tokens_left: int = 0
    rows_left: int = 0


class ArrivalQueue:
    """Sequences ordered by arrival, which is the order of their ids."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Over a copy, so that members may leave meanwhile."""
        return iter(tuple(self._sequences))

    def __reversed__(self) -> Iterator[Sequence]:
        return iter(tuple(reversed(self._sequences)))

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_arrival)

    def discard(self, sequence: Sequence) -> None:
        if sequence in self._sequences:
            self._sequences.remove(sequence)


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id


class Scheduler:
    """Moves sequences between WAITING, FETCHING and RUNNING and composes steps. Synchronous, effect-free
    beyond its own state and the block bookkeeping."""

    def __init__(
        self, limits: EngineLimits, kv: KVCacheManager, choose_restore: ChooseRestore, choose_fetch: ChooseFetch
    ) -> None:
        self._limits = limits
        self._kv = kv
        self._choose_restore = choose_restore
        self._choose_fetch = choose_fetch
        self.waiting = ArrivalQueue()
        self.fetching = ArrivalQueue()
        self.running = ArrivalQueue()

    def limit(self, limits: EngineLimits) -> None:
        """From the next step on."""
        self._limits = limits

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def schedule(self, last_step: int) -> StepPlan:
        """Compose the next step; last_step is the last one submitted. The plan may have no rows."""
        plan = StepPlan(tokens_left=self._limits.max_tokens_per_step, rows_left=self._limits.max_rows)
        prompts = self._continue_decodes(plan, last_step)
        self._continue_prompts(prompts, plan)
        self._admit(plan)
        return plan

    def fetched(self, sequence: Sequence, token_ids: tuple[int, ...]) -> None:
        """The ticket's KV has arrived and is verified; token_ids were sampled behind the sequence's tokens."""
        self.fetching.discard(sequence)
        sequence.fetched(token_ids)
        self._kv.commit(sequence, sequence.num_computed_tokens)
        self.running.add(sequence)

    def restored(self, sequence: Sequence, num_blocks: int) -> None:
        """The first num_blocks of restore_blocks hold verified KV; the rest is computed."""
        self.fetching.discard(sequence)
        sequence.restored(sequence.num_computed_tokens + num_blocks * self._kv.block_size)
        self._kv.commit(sequence, sequence.num_computed_tokens)
        self.running.add(sequence)

    def lose_restore(self, sequence: Sequence, last_step: int) -> None:
        """Back to the queue, without blocks and without another restore."""
        self.fetching.discard(sequence)
        self._kv.free(sequence, last_step)
        sequence.lose_restore()
        self.waiting.add(sequence)

    def restore_blocks(self, sequence: Sequence) -> tuple[int, tuple[int, ...]]:
        """(logical index of the first, blocks) a restoring sequence gets from a tier or another engine."""
        first = self._kv.blocks_for(sequence.num_computed_tokens)
        return first, self._kv.block_ids(sequence, sequence.num_restoring_tokens)[first:]

    def fetch_blocks(self, sequence: Sequence) -> dict[int, int]:
        """Logical index → block, for every block of a fetching sequence's ticket that was not hit."""
        blocks = self._kv.block_ids(sequence, sequence.num_fetch_tokens)
        first = self._kv.blocks_for(sequence.num_computed_tokens)
        return dict(enumerate(blocks[first:], first))

    def remove(self, sequence: Sequence, last_step: int) -> None:
        """End a sequence in any state; its blocks are reusable once last_step has completed."""
        for queue in (self.waiting, self.fetching, self.running):
            queue.discard(sequence)
        self._kv.free(sequence, last_step)
        sequence.finish()

    def _continue_decodes(self, plan: StepPlan, last_step: int) -> list[Sequence]:
        """Returns the sequences that are in their prompts."""
        prompts: list[Sequence] = []
        for sequence in self.running:
            # A member of the copy iterated over may have been preempted for an older one.
            if sequence.state is not SequenceState.RUNNING:
                continue
            pending = sequence.num_pending_tokens
            if pending > 1:
                prompts.append(sequence)
            elif pending and plan.tokens_left and plan.rows_left and self._grow(sequence, plan, last_step):
                self._take(sequence, 1, plan)
        return prompts

    def _continue_prompts(self, prompts: list[Sequence], plan: StepPlan) -> None:
        for sequence in prompts:
            if not plan.tokens_left or not plan.rows_left:
                return
            if sequence.state is SequenceState.RUNNING:
                self._take(sequence, sequence.num_pending_tokens, plan)

    def _admit(self, plan: StepPlan) -> None:
        for sequence in self.waiting:
            if len(self.running) + len(self.fetching) >= self._limits.max_rows:
                return
            if sequence.num_placeholders:
                # Preempted with a token in flight: it arrives with the step in flight.
                return
            if sequence.ticket is None and not (plan.tokens_left and plan.rows_left):
                return
            if sequence.handoff and self._kv.leased_share >= LEASED_WATERMARK:
                # Others may pass: it waits for those who take KV, not for a turn.
                continue
            if not self._place(sequence):
                return
            self.waiting.discard(sequence)
            if sequence.state is SequenceState.FETCHING:
                self.fetching.add(sequence)
                (plan.restoring if sequence.num_restoring_tokens else plan.fetching).append(sequence)
            else:
                self.running.add(sequence)
                plan.admitted.append(sequence)
                self._take(sequence, sequence.num_pending_tokens, plan)

    def _place(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its blocks: all, or none and False."""
        fetches = sequence.ticket is not None
        known = sequence.num_tokens
        hit = self._kv.match(sequence, known if fetches else known - 1)
        if not self._kv.allocate(sequence, max(known + fetches, sequence.num_fetch_tokens), hit):
            return False
        num_hit_tokens = len(hit) * self._kv.block_size
        if fetches:
            sequence.start_fetch(num_hit_tokens)
            return True
        num_blocks, source = self._restorable(sequence, len(hit))
        if num_blocks:
            sequence.start_restore(num_hit_tokens, num_hit_tokens + num_blocks * self._kv.block_size, source)
        else:
            sequence.admit(num_hit_tokens)
        return True

    def _restorable(self, sequence: Sequence, num_hit_blocks: int) -> tuple[int, KVSource | None]:
        """How many blocks behind a device hit to restore, and from which engine; None is from this one's tiers, which
        are preferred to a source that holds no more."""
        if not sequence.restorable:
            return 0, None
        limit = sequence.num_tokens - 1
        tiers = self._kv.match_tiers(sequence, num_hit_blocks, limit)
        restored = self._choose_restore(tiers) if tiers else 0
        if source := sequence.source:
            # Without prefix caching blocks have no hashes to ask for.
            named = min(len(sequence.block_hashes), limit // self._kv.block_size)
            held = min(source.num_blocks, named) - num_hit_blocks
            fetched = self._choose_fetch(source, held) if held > restored else 0
            if fetched:
                return fetched, source
        return restored, None

    def _take(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        num_tokens = min(num_tokens, self._limits.chunk_size, plan.tokens_left)
        blocks = self._kv.block_ids(sequence, sequence.num_scheduled_tokens + num_tokens)
        plan.rows.append(sequence.schedule(num_tokens, blocks))
        plan.scheduled.append(sequence)
        plan.tokens_left -= num_tokens
        plan.rows_left -= 1

    def _grow(self, sequence: Sequence, plan: StepPlan, last_step: int) -> bool:
        """Make room for one more token, if need be at the expense of younger sequences."""
        while not self._kv.allocate(sequence, sequence.num_scheduled_tokens + 1):
            victim = None if self._kv.num_cooling else self._youngest_behind(sequence)
            if victim is None:
                return False
            self._preempt(victim, plan, last_step)
        return True

    def _youngest_behind(self, sequence: Sequence) -> Sequence | None:
        # Decodes are scheduled oldest first, so nobody behind this one has a row in this step yet.
        for candidate in reversed(self.running):
            if candidate is sequence:
                return None
            if not candidate.pinned:
                return candidate
        return None

    def _preempt(self, victim: Sequence, plan: StepPlan, last_step: int) -> None:
        self.running.discard(victim)
        self._kv.free(victim, last_step)
        if victim.preempt():
            plan.released.append(victim.sequence_id)
        self.waiting.add(victim)
        plan.preempted.append(victim)
