"""Defects the model check must find: each takes one rule out of the product."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import inf
from typing import Any
from unittest.mock import patch

from pdserve.core.ticket import HandoffDone
from pdserve.engine import leave
from pdserve.engine.core import EngineCore
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.handoff_target import FetchOutcome, HandoffTarget
from pdserve.engine.held_tickets import HeldTickets
from pdserve.engine.prefix_fetches import PrefixFetches
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.kvcache.manager import KVCacheManager
from pdserve.transfer.pull import LocalPull
from pdserve.transfer.service import LocalTransferService


@contextmanager
def no_quarantine_after_failure() -> Iterator[None]:
    """Target blocks of a failed fetch are free at once."""
    outcome = HandoffTarget._outcome

    def forgetful(self: HandoffTarget, *args: Any) -> FetchOutcome:
        return replace(outcome(self, *args), unsettled=())

    with patch.object(HandoffTarget, "_outcome", forgetful):
        yield


@contextmanager
def no_quarantine_after_cancel() -> Iterator[None]:
    """A cancelled fetch's blocks are free although reads are in flight."""
    with (
        patch.object(KVCacheManager, "quarantine", lambda *_: None),
        patch.object(KVCacheManager, "unquarantine", lambda *_: None),
    ):
        yield


@contextmanager
def settled_too_early() -> Iterator[None]:
    """Quarantine ends with the deadline instead of with the read."""

    async def at_once(self: LocalPull) -> None:
        return

    with patch.object(LocalPull, "settled", at_once):
        yield


@contextmanager
def settled_twice() -> Iterator[None]:
    """Quarantine is lifted a second time."""
    settle = HandoffTarget._settle

    async def twice(self: HandoffTarget, fetch: Any, unsettled: tuple[int, ...]) -> None:
        await settle(self, fetch, unsettled)
        await settle(self, fetch, unsettled)

    with patch.object(HandoffTarget, "_settle", twice):
        yield


@contextmanager
def lease_released_twice() -> Iterator[None]:
    """The source's blocks are given back once more than they were leased."""
    release = KVCacheManager.release

    def twice(self: KVCacheManager, ticket_id: str) -> bool:
        blocks = self._tickets.get(ticket_id)
        released = release(self, ticket_id)
        if blocks is not None:
            self._pool.unlease(blocks)
        return released

    with patch.object(KVCacheManager, "release", twice):
        yield


@contextmanager
def no_lease_guard() -> Iterator[None]:
    """Reads start whether the lease holds or not."""
    with patch.object(HeldTickets, "lease_left", lambda *_: inf):
        yield


@contextmanager
def lease_counted_from_arrival() -> Iterator[None]:
    """A ticket's lease is taken to begin when the target first sees it."""

    def hold(self: HeldTickets, ticket: Any) -> None:
        self._leases[ticket.id] = self._clock.monotonic() + ticket.lease

    def deaf(self: HeldTickets, sent_at: float, ticket_ids: tuple[str, ...]) -> None:
        for ticket_id in ticket_ids:
            if ticket_id in self._leases:
                self._leases[ticket_id] = self._clock.monotonic() + self._times.lease

    with patch.object(HeldTickets, "hold", hold), patch.object(HeldTickets, "renewed", deaf):
        yield


@contextmanager
def cancel_frees_under_a_reader() -> Iterator[None]:
    """The source gives a cancelled prompt's blocks away while a target reads them."""
    withdraw = HandoffSource.withdraw

    def hasty(self: HandoffSource, sequence_id: int, reason: str) -> None:
        offer = self._by_sequence.get(sequence_id)
        if offer is not None:
            offer.attached = False
        withdraw(self, sequence_id, reason)

    with patch.object(HandoffSource, "withdraw", hasty):
        yield


class _EveryDigest(bytes):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = bytes.__hash__


@contextmanager
def digests_not_compared() -> Iterator[None]:
    """Whatever arrives is taken for what was sent."""

    def flattering(*_: Any) -> bytes:
        return _EveryDigest()

    with patch.object(LocalTransferService, "_target_digest", flattering):
        yield


@contextmanager
def runs_before_everything_arrived() -> Iterator[None]:
    """The first token is enough to go on."""

    def satisfied(self: HandoffTarget, fetch: Any) -> bool:
        return isinstance(fetch.done, HandoffDone)

    with patch.object(HandoffTarget, "_satisfied", satisfied):
        yield


@contextmanager
def lends_without_a_lease() -> Iterator[None]:
    """Blocks are lent that nothing keeps from being handed out."""

    def careless(self: KVCacheManager, ticket_id: str, hashes: Any) -> tuple[int, ...]:
        return self._cache.lookup(hashes)

    with patch.object(KVCacheManager, "lend", careless):
        yield


@contextmanager
def growth_not_leased() -> Iterator[None]:
    """Blocks a leaving sequence fills after its ticket was issued are offered without a lease."""

    def unleased(self: KVCacheManager, owner: Any, ticket_id: str, num_tokens: int) -> tuple[int, ...]:
        if not self._tickets[ticket_id]:
            self._tickets[ticket_id] = self.block_ids(owner, num_tokens)
            self._pool.lease(self._tickets[ticket_id])
        return self.block_ids(owner, num_tokens)

    with patch.object(KVCacheManager, "extend_lease", unleased):
        yield


@contextmanager
def a_fetch_given_up_is_forgotten() -> Iterator[None]:
    """What a fetch's reads may still write into is free at once."""
    run = PrefixFetches._settle

    async def hasty(self: PrefixFetches, fetch: Any, pulls: Any, summary: Any) -> None:
        with patch.object(type(pulls), "settled", lambda _: asyncio.sleep(0)):
            await run(self, fetch, pulls, summary)

    with patch.object(PrefixFetches, "_settle", hasty):
        yield


@contextmanager
def growth_offered_too_early() -> Iterator[None]:
    """The block a leaving sequence still writes to counts as final."""
    computed = HandoffSource.computed

    def hasty(self: HandoffSource, sequence_id: int, num_tokens: int, source_blocks: tuple[int, ...] = ()) -> None:
        offer = self._by_sequence.get(sequence_id)
        early = num_tokens + 1 if offer and offer.ticket.growth else num_tokens
        computed(self, sequence_id, early, source_blocks)

    with patch.object(HandoffSource, "computed", hasty):
        yield


@contextmanager
def goes_on_after_handing_over() -> Iterator[None]:
    """The source hands a sequence over and does not stop."""

    def both(self: EngineCore, sequence: Any) -> None:
        if leave.has_stopped(sequence) and sequence.state is SequenceState.RUNNING:
            self._events.append(leave.hand_over(sequence, self.kv))
            sequence.leave = None

    with patch.object(EngineCore, "_hand_over_stopped", both):
        yield


@contextmanager
def preempted_while_leaving() -> Iterator[None]:
    """A leaving sequence may lose its blocks to an older one, and keeps its ticket."""
    with patch.object(Sequence, "pinned", property(lambda self: self.handoff)):
        yield


MUTANTS: tuple[Callable[[], AbstractContextManager[None]], ...] = (
    no_quarantine_after_failure,
    no_quarantine_after_cancel,
    settled_too_early,
    settled_twice,
    lease_released_twice,
    no_lease_guard,
    lease_counted_from_arrival,
    cancel_frees_under_a_reader,
    digests_not_compared,
    runs_before_everything_arrived,
    lends_without_a_lease,
    a_fetch_given_up_is_forgotten,
    growth_not_leased,
    growth_offered_too_early,
    goes_on_after_handing_over,
    preempted_while_leaving,
)
