"""What the target end of a link keeps of its tickets: leases, subscribers, answers to Release. No wire."""

import asyncio
from collections.abc import Callable

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.errors import LeaseExpired, PdserveError
from pdserve.core.ticket import HandoffNews, TicketGone, TransferTicket
from pdserve.engine.handoff_source import Deliver


class HeldTickets:
    """The tickets of one source incarnation."""

    def __init__(self, engine_id: str, times: Times, clock: Clock) -> None:
        self._engine_id = engine_id
        self._times = times
        self._clock = clock
        self._leases: dict[str, float] = {}
        """Ticket → monotonic time until which its lease surely holds."""
        self._subscribers: dict[str, Deliver] = {}
        self._attached: dict[str, float] = {}
        """Ticket → monotonic time at which Attach or Lend was sent, until news prove that it arrived."""
        self._releases: dict[str, asyncio.Future[bool]] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """Tickets whose leases the next heartbeat renews."""
        return tuple(self._leases)

    def hold(self, ticket: TransferTicket) -> None:
        """How long ago it was issued is not known here, so its lease counts from the first sign of a renewal."""
        self._leases[ticket.id] = 0.0

    def borrow(self, ticket_id: str, deliver: Deliver) -> None:
        """Lend is being sent: it begins the lease where it arrives."""
        self._leases[ticket_id] = 0.0
        self.subscribe(ticket_id, deliver)

    def renewed(self, sent_at: float, ticket_ids: tuple[str, ...]) -> None:
        """The source has renewed these for a heartbeat sent at sent_at (monotonic)."""
        for ticket_id in ticket_ids:
            if ticket_id in self._leases:
                self._leases[ticket_id] = max(self._leases[ticket_id], sent_at + self._times.lease)

    def lease_left(self, ticket_id: str) -> float:
        """Seconds in which reads may still start; none from 0 down."""
        return self._leases.get(ticket_id, 0.0) - self._times.lease_guard - self._clock.monotonic()

    def subscribe(self, ticket_id: str, deliver: Deliver) -> None:
        """Attach or Lend is being sent, which renews the lease where it arrives."""
        self._subscribers[ticket_id] = deliver
        self._attached[ticket_id] = self._clock.monotonic()

    def deliver(self, news: HandoffNews) -> None:
        attached_at = self._attached.pop(news.ticket_id, None)
        if attached_at is not None and not isinstance(news, TicketGone):
            self.renewed(attached_at, (news.ticket_id,))
        if deliver := self._subscribers.get(news.ticket_id):
            deliver(news)

    def forget(self, ticket_id: str) -> None:
        self._subscribers.pop(ticket_id, None)
        self._leases.pop(ticket_id, None)
        self._attached.pop(ticket_id, None)

    async def release(self, ticket_id: str, ask: Callable[[], None]) -> None:
        """Ask the source to end the lease and wait for its word. Raises LeaseExpired if what was read must be
        discarded, or what `fail` was told."""
        self.forget(ticket_id)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._releases[ticket_id] = answer
        ask()
        try:
            async with asyncio.timeout(self._times.release_answer):
                expired = await answer
        except TimeoutError:
            raise LeaseExpired(f"{self._engine_id} did not confirm that its lease still held") from None
        finally:
            self._releases.pop(ticket_id, None)
        if expired:
            raise LeaseExpired(f"{self._engine_id} had already ended the lease")

    def released(self, ticket_id: str, *, expired: bool) -> None:
        """The source's answer."""
        answer = self._releases.get(ticket_id)
        if answer and not answer.done():
            answer.set_result(expired)

    def fail(self, error: PdserveError) -> None:
        """No answer will come any more."""
        for answer in self._releases.values():
            if not answer.done():
                answer.set_exception(error)
