"""The side that holds KV: tickets, their leases, and the regions that became readable.

A handoff's ticket is ISSUED, then ATTACHED, and ends RELEASED, EXPIRED or WITHDRAWN: the left half of the state machine
drawn in handoff_target. A loan's ticket, of blocks whose KV is final, is ATTACHED from the beginning.

Blocks stay leased until the ticket leaves ISSUED and ATTACHED, and its digests under way have ended. Leaving is final
and happens once. While a target is attached only its Release or the lease's end frees blocks: it may be reading them
right now.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import Cancelled, LayoutMismatch, LeaseExpired, PdserveError, TransferFailed, Unavailable
from pdserve.core.failpoints import reach
from pdserve.core.protocols import TransferService
from pdserve.core.shards import KVPart, KVShard
from pdserve.core.ticket import (
    HandoffDone,
    HandoffNews,
    Lent,
    RegionReady,
    TicketGone,
    TransferTicket,
    region_seed,
)
from pdserve.engine.regions import next_region

_log = structlog.get_logger(__name__)

Deliver = Callable[[HandoffNews], None]
Parts = tuple[KVPart | None, ...]
"""What a target's ranks take from which of the source's ranks; (None,) is whole blocks between two engines of one
rank."""

_REMEMBERED_TICKETS = 4096


@dataclass(slots=True, eq=False)
class _Offer:
    ticket: TransferTicket
    sequence_id: int | None
    """None for a loan: no sequence computes its KV."""
    source_blocks: tuple[int, ...]
    expires_at: float
    num_tokens: int = 0
    """Tokens whose KV is final."""
    final_blocks: int = 0
    first_block: int = 0
    """Where the target wants it to begin."""
    published_blocks: int = 0
    done: HandoffDone | None = None
    deliver: Deliver | None = None
    parts: Parts = (None,)
    bulk: bool = False
    """The target wants all of it at once, when the prompt is complete."""
    attached: bool = False
    """A target may be reading, even if the link it came over has broken since."""
    gone: TicketGone | None = None
    """Nothing more will come of it: it only waits for its target to let go."""
    ended: bool = False
    digests: set["asyncio.Task[None]"] = field(default_factory=set)
    """Under way, perhaps queued: each zeroes what lies behind the last token of its blocks, which must be this ticket's
    until then, however early its target lets go."""


class HandoffSource:
    """Tickets of one engine. on_end(ticket_id, sequence_id) is called once when blocks may be freed; a loan has no
    sequence. on_caught_up(sequence_id) is called when a running sequence's target has everything but the end."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        transfer: TransferService,
        times: Times,
        clock: Clock,
        on_end: Callable[[str, int | None], None],
        on_caught_up: Callable[[int], None],
    ) -> None:
        self._endpoint = endpoint
        self._transfer = transfer
        self._times = times
        self._clock = clock
        self._on_end = on_end
        self._on_caught_up = on_caught_up
        self._offers: dict[str, _Offer] = {}
        self._by_sequence: dict[int, _Offer] = {}
        self._ended: dict[str, TicketGone | None] = {}
        self._digesting: set[_Offer] = set()
        self._block_bytes = transfer.layout.block_bytes

    @property
    def num_open(self) -> int:
        return len(self._offers)

    def issue(
        self,
        ticket_id: str,
        sequence_id: int,
        request_id: str,
        num_tokens: int,
        source_blocks: tuple[int, ...],
        growth: int = 0,
    ) -> TransferTicket:
        """Offer a sequence's blocks, which the caller has leased under ticket_id; growth as in the ticket."""
        ticket = self._ticket(ticket_id, request_id, num_tokens, growth)
        self._by_sequence[sequence_id] = self._offer(ticket, sequence_id, source_blocks)
        return ticket

    def lend(
        self,
        ticket_id: str,
        deliver: Deliver,
        parts: Parts,
        lease: Callable[[str], tuple[int, ...]],
        restore_seconds: float = 0.0,
    ) -> None:
        """A reader asks for KV that is final. lease(ticket_id) leases its blocks, perhaps none; deliver hears Lent,
        with restore_seconds as there, and the parts of all regions, or why there is nothing."""
        if ticket_id in self._offers:
            return  # asked twice
        if ticket_id in self._ended:
            deliver(self._ended[ticket_id] or _unknown(ticket_id))
            return
        if not all(_holds(self._transfer.address.shards, part) for part in parts):
            deliver(_not_held(ticket_id))
            return
        blocks = lease(ticket_id)
        if not blocks:
            deliver(TicketGone(ticket_id=ticket_id, code=Unavailable.code, message="nothing of it can be lent now"))
            return
        reach("lending")
        ticket = self._ticket(ticket_id, "", len(blocks) * self._transfer.layout.block_size)
        offer = self._offer(ticket, None, blocks)
        offer.parts, offer.deliver, offer.attached = parts, deliver, True
        offer.num_tokens, offer.final_blocks = ticket.num_tokens, len(blocks)
        deliver(Lent(ticket_id=ticket_id, num_blocks=len(blocks), restore_seconds=restore_seconds))
        self._publish(offer)

    def computed(self, sequence_id: int, num_tokens: int, source_blocks: tuple[int, ...] = ()) -> None:
        """The KV of positions below num_tokens is final; source_blocks are the leased ones if they became more."""
        offer = self._by_sequence.get(sequence_id)
        if offer is None:
            return
        complete = num_tokens >= offer.ticket.num_tokens and not offer.ticket.growth
        if complete:
            reach("last_chunk")
        offer.source_blocks = source_blocks or offer.source_blocks
        offer.num_tokens = num_tokens
        offer.final_blocks = offer.ticket.num_blocks if complete else num_tokens // offer.ticket.block_size
        self._publish(offer)

    def prefilled(self, sequence_id: int, first_token: int, *, finished: bool) -> None:
        """The first token is sampled; finished if the request ended with it."""
        if offer := self._by_sequence.get(sequence_id):
            self._done(offer, (first_token,), finished=finished)

    def handed_over(
        self, sequence_id: int, num_tokens: int, token_ids: tuple[int, ...], source_blocks: tuple[int, ...]
    ) -> None:
        """A running sequence has stopped: its KV of num_tokens tokens is final, in source_blocks; token_ids were
        sampled behind the ticket's."""
        offer = self._by_sequence.get(sequence_id)
        if offer is None:
            return
        offer.source_blocks, offer.num_tokens = source_blocks, num_tokens
        offer.final_blocks = offer.ticket.blocks_for(num_tokens)
        self._done(offer, token_ids, finished=False)
        self._publish(offer)

    def caught_up(self, ticket_id: str) -> None:
        """The target has all that is final."""
        offer = self._offers.get(ticket_id)
        if offer and offer.sequence_id is not None and offer.ticket.growth and not (offer.done or offer.gone):
            self._on_caught_up(offer.sequence_id)

    def withdraw(self, sequence_id: int, reason: str, code: str = Cancelled.code) -> None:
        """Nobody can go on from the sequence's KV, unless it was handed over already. code is an error's."""
        offer = self._by_sequence.get(sequence_id)
        if offer is None or offer.done:
            return
        gone = TicketGone(ticket_id=offer.ticket.id, code=code, message=reason)
        offer.gone = gone
        del self._by_sequence[sequence_id]
        if offer.deliver:
            offer.deliver(gone)
        if not offer.attached:
            self._end(offer, gone)

    def attach(
        self, ticket_id: str, first_block: int, deliver: Deliver, parts: Parts = (None,), *, bulk: bool = False
    ) -> None:
        """A target has blocks for everything from first_block on: deliver the parts of regions as they become final, or
        with bulk when all of them are. Renews the lease, for the target cannot know how old it is."""
        offer = self._offers.get(ticket_id)
        if offer is None:
            deliver(self._ended.get(ticket_id) or _unknown(ticket_id))
            return
        if offer.gone:
            deliver(offer.gone)
            return
        if not all(_holds(offer.ticket.ranks, part) for part in parts):
            deliver(_not_held(ticket_id))
            return
        offer.parts = parts
        offer.deliver = deliver
        offer.attached, offer.bulk = True, bulk
        offer.expires_at = self._clock.monotonic() + self._times.lease
        offer.first_block = offer.published_blocks = first_block
        # Regions first: the other thread begins to digest while this one sends the token.
        self._publish(offer)
        if offer.done:
            deliver(offer.done)

    def detach(self, deliver: Deliver) -> None:
        """The link to a target broke. It may still be reading, so its leases run on."""
        for offer in self._offers.values():
            if offer.deliver is deliver:
                offer.deliver = None

    def renew(self, ticket_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Lengthen leases; returns the tickets that still had one."""
        renewed = tuple(ticket_id for ticket_id in ticket_ids if ticket_id in self._offers)
        for ticket_id in renewed:
            self._offers[ticket_id].expires_at = self._clock.monotonic() + self._times.lease
        return renewed

    def release(self, ticket_id: str) -> bool:
        """The target is done reading. True if the lease had already ended: it must discard the KV."""
        offer = self._offers.get(ticket_id)
        if offer is None:
            self._remember(ticket_id, None)
            return True
        self._end(offer, None)
        return False

    def expire(self) -> None:
        """End every lease that ran out."""
        now = self._clock.monotonic()
        for offer in [o for o in self._offers.values() if o.expires_at <= now]:
            gone = TicketGone(
                ticket_id=offer.ticket.id,
                code=LeaseExpired.code,
                message=f"the lease of {self._times.lease:g} s ended without renewal",
            )
            if offer.deliver:
                offer.deliver(gone)
            self._end(offer, gone)

    def _done(self, offer: _Offer, token_ids: tuple[int, ...], *, finished: bool) -> None:
        offer.done = HandoffDone(ticket_id=offer.ticket.id, tokens=token_ids, finished=finished)
        if offer.deliver:
            offer.deliver(offer.done)

    async def close(self) -> None:
        tasks = [task for offer in self._digesting for task in offer.digests]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ticket(self, ticket_id: str, request_id: str, num_tokens: int, growth: int = 0) -> TransferTicket:
        return TransferTicket(
            id=ticket_id,
            request_id=request_id,
            engine_id=self._endpoint.engine_id,
            epoch=self._endpoint.epoch,
            address=self._endpoint.address,
            layout_hash=self._transfer.layout.wire_hash,
            num_tokens=num_tokens,
            block_size=self._transfer.layout.block_size,
            lease=self._times.lease,
            ranks=self._transfer.address.shards,
            growth=growth,
        )

    def _offer(self, ticket: TransferTicket, sequence_id: int | None, source_blocks: tuple[int, ...]) -> _Offer:
        offer = _Offer(ticket, sequence_id, source_blocks, self._clock.monotonic() + self._times.lease)
        self._offers[ticket.id] = offer
        return offer

    def _publish(self, offer: _Offer) -> None:
        if offer.gone or (offer.bulk and offer.final_blocks < offer.ticket.num_blocks):
            return
        begun = offer.published_blocks
        while offer.deliver and offer.published_blocks < offer.final_blocks:
            first = offer.published_blocks
            end = first + next_region(self._block_bytes, first - begun, offer.final_blocks - first)
            offer.published_blocks = end
            for parts in _same_bytes(offer.parts):
                task = asyncio.get_running_loop().create_task(self._digest_and_deliver(offer, first, end, parts))
                offer.digests.add(task)
                self._digesting.add(offer)
                task.add_done_callback(partial(self._digested, offer))

    async def _digest_and_deliver(self, offer: _Offer, first: int, end: int, parts: Parts) -> None:
        """parts are the same bytes for different ranks of the target: they have one digest."""
        ticket = offer.ticket
        blocks = offer.source_blocks[first:end]
        num_tokens = min(offer.num_tokens, end * ticket.block_size) - first * ticket.block_size
        seed = region_seed(ticket.id, ticket.epoch, first, parts[0])
        news: list[HandoffNews]
        try:
            digest = await self._transfer.digest(blocks, num_tokens, seed, parts[0])
            news = [
                RegionReady(ticket_id=ticket.id, first_block=first, source_blocks=blocks, digest=digest, part=part)
                for part in parts
            ]
        except PdserveError as error:
            news = [TicketGone(ticket_id=ticket.id, code=error.code, message=str(error))]
        except Exception:
            _log.exception("digest failed internally", ticket=ticket.id)
            news = [TicketGone(ticket_id=ticket.id, code=TransferFailed.code, message="its KV could not be digested")]
        for item in news:
            if offer.deliver and ticket.id in self._offers:
                offer.deliver(item)

    def _digested(self, offer: _Offer, task: "asyncio.Task[None]") -> None:
        offer.digests.discard(task)
        if offer.digests:
            return
        self._digesting.discard(offer)
        if offer.ended and not task.cancelled():
            self._on_end(offer.ticket.id, offer.sequence_id)

    def _end(self, offer: _Offer, gone: TicketGone | None) -> None:
        del self._offers[offer.ticket.id]
        if offer.sequence_id is not None and self._by_sequence.get(offer.sequence_id) is offer:
            del self._by_sequence[offer.sequence_id]
        self._remember(offer.ticket.id, gone)
        offer.ended = True
        if not offer.digests:
            self._on_end(offer.ticket.id, offer.sequence_id)

    def _remember(self, ticket_id: str, gone: TicketGone | None) -> None:
        """Nothing is offered under this ticket (again); it may also be one whose Release overtook its loan."""
        self._ended.setdefault(ticket_id, gone)
        if len(self._ended) > _REMEMBERED_TICKETS:
            del self._ended[next(iter(self._ended))]


def _holds(ranks: tuple[KVShard, ...], part: KVPart | None) -> bool:
    """Whether the part is there to be read."""
    if part is None:
        return len(ranks) == 1
    return any(
        shard.rank == part.source_rank and shard.heads[0] <= part.heads[0] < part.heads[1] <= shard.heads[1]
        for shard in ranks
    )


def _same_bytes(parts: Parts) -> list[Parts]:
    """Parts that differ in who reads them only, together."""
    groups: dict[object, list[KVPart | None]] = {}
    for part in parts:
        groups.setdefault(part and (part.source_rank, part.heads), []).append(part)
    return [tuple(group) for group in groups.values()]


def _not_held(ticket_id: str) -> TicketGone:
    message = "these ranks do not hold the heads that were asked for"
    return TicketGone(ticket_id=ticket_id, code=LayoutMismatch.code, message=message)


def _unknown(ticket_id: str) -> TicketGone:
    return TicketGone(ticket_id=ticket_id, code=LeaseExpired.code, message="no such ticket, or its lease has ended")
