"""One request from route to last token, whatever dies on the way."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial

from pdserve.core.admission import TenantRules
from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineView, Route
from pdserve.core.deadline import Deadline
from pdserve.core.endpoint import EngineState
from pdserve.core.errors import DeadlineExceeded, EngineDied, Unavailable
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.admission import AdmissionGate, Visit
from pdserve.dispatch.attempt import Attempt
from pdserve.dispatch.booking import Booking
from pdserve.dispatch.demand import DemandMeter, Metered
from pdserve.dispatch.migration import MigrationRules, Migrator
from pdserve.dispatch.replay import Lost, ReplayBudget, ReplayHistory, ReplayRules, continuation, rebased
from pdserve.dispatch.sessions import SessionPool
from pdserve.dispatch.tenant_limits import TenantCounters
from pdserve.router.admission import AdmissionRules
from pdserve.router.router import Router
from pdserve.scaler.demand import Demand
from pdserve.scaler.orders import Orders
from pdserve.telemetry.record import RequestRecord

_DEADLINE_GRACE = 1.0
"""Seconds an engine gets to report an expired deadline itself, with its trace."""

_STAMPED = "first_token", "second_token"


class Dispatcher:
    """Runs requests on the engines of a SessionPool."""

    def __init__(
        self,
        sessions: SessionPool,
        router: Router,
        clock: Clock,
        replay: ReplayRules | None = None,
        migration: MigrationRules | None = None,
        admission: AdmissionRules | None = None,
        tenants: Mapping[str, TenantRules] | None = None,
        counters: TenantCounters | None = None,
    ) -> None:
        """tenants: rules by name; others have weight 1 and no limits. counters: over all routers."""
        self._sessions = sessions
        self._router = router
        self._clock = clock
        self._replay = replay or ReplayRules()
        self._budget = ReplayBudget(self._replay, clock)
        self._migrator = Migrator(sessions, router, clock, migration)
        self._gate = AdmissionGate(sessions, router, clock, admission, tenants, counters)
        self._meter = DemandMeter(clock)
        self._acquainted = False

    @property
    def ready(self) -> bool:
        """Whether a long prompt could be served now. The first time, not before every engine there is has been
        heard from: a gateway that starts would else make one pool do the work of both. Engines that sleep are started
        for the next request, so they are no reason to keep it away, nor is it that there are none when it starts."""
        state = self._sessions.state()
        ready, woken_by_requests = self._router.ready(state), self._gate.patience > 0
        asleep = all(view.endpoint.state is EngineState.DEAD for view in state.engines)
        known = ready or (woken_by_requests and asleep)
        self._acquainted = self._acquainted or (known and not self._sessions.opening)
        return (ready or woken_by_requests) and self._acquainted

    def engines(self) -> tuple[EngineView, ...]:
        return self._sessions.state().engines

    def waiting(self) -> dict[str, int]:
        """How many requests wait to be let in, by tenant."""
        return self._gate.waiting()

    def demand(self) -> Demand:
        """The load since the last call, and how the engines stand."""
        return self._meter.report(self._sessions.state(), self._gate.held())

    def obey(self, orders: Orders) -> None:
        """What the scaler asks of gateways."""
        self._sessions.bypass_below = orders.bypass_below
        self._gate.patience = orders.patience

    async def move(self, request_id: str) -> None:
        """Have a request that decodes now go on at another engine. Raises PdserveError when it does not: it stays, or
        is replayed."""
        try:
            await self._migrator.move(request_id)
        except Lost as loss:
            raise loss.error from loss

    async def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]:
        """Stream a request's tokens; every delta but the last has no finish_reason.

        Losing an engine or a link is not seen: the request goes on elsewhere from its last token, within
        ReplayRules. Closing the iterator cancels it everywhere. Raises Unavailable, EngineDied or a
        TransferError when that is impossible, Overloaded when it is not let in, DeadlineExceeded, or what an engine
        refused it with.
        """
        record.stamp("received", self._clock.unix())
        try:
            # What a tenant's own limit refuses is no demand: engines would be started for it.
            async with self._gate.visit(request, record) as visit:
                with self._meter.request(request, record) as metered:
                    async with aclosing(self._serve(request, record, visit, metered)) as deltas:
                        async for delta in deltas:
                            visit.tokens(len(delta.token_ids))
                            metered.came(len(delta.token_ids))
                            yield delta
        finally:
            record.stamp("finished", self._clock.unix())

    async def _serve(
        self, request: Request, record: RequestRecord, visit: Visit, metered: Metered
    ) -> AsyncGenerator[TokenDelta, None]:
        deadline = Deadline(asyncio.get_running_loop().time() + request.timeout + _DEADLINE_GRACE)
        history = ReplayHistory(self._replay)
        emitted: list[int] = []
        try:
            while True:
                share = continuation(request, emitted, history.attempts)
                offset = len(emitted)
                try:
                    async with aclosing(self._attempt(share, history, record, deadline, visit, metered)) as deltas:
                        async for delta in deltas:
                            whole = rebased(delta, request.id, offset)
                            self._extend(record, emitted, whole)
                            yield whole
                    return
                except Lost as loss:
                    if loss.link:
                        self._sessions.link_lost(loss.link)
                    if loss.damaging:
                        self._sessions.link_damaged(loss.damaging)
                    history.note(loss)
                    record.give_up(loss.error, len(emitted), self._clock.unix())
                    await deadline.before(self._budget.admit())
        except TimeoutError:
            if not deadline.struck:
                raise
            raise DeadlineExceeded(f"the request took longer than {request.timeout:g} s") from None
        finally:
            deadline.close()

    async def _attempt(
        self,
        share: Request,
        history: ReplayHistory,
        record: RequestRecord,
        deadline: Deadline,
        visit: Visit,
        metered: Metered,
    ) -> AsyncGenerator[TokenDelta, None]:
        # Nothing may wait between the gate's word and the booking: the next decision counts on it.
        turn = self._route_again(share, history) if history.attempts else visit.route()
        route, decided = await deadline.before(turn)
        record.route = route
        record.stamp("routed", self._clock.unix())
        computed = False
        try:
            with self._sessions.book(share, route) as booking:
                visit.booked()
                if not history.attempts:
                    metered.routed(route, self._sessions.ledgers.get(route.prefill.key))
                reconfirm = partial(self._reconfirm, share, booking, history)
                movable = partial(self._migrator.movable, booking)
                attempt = Attempt(self._sessions, route, record, self._clock, reconfirm, movable)
                try:
                    async with aclosing(attempt.deltas(share)) as deltas:
                        while delta := await deadline.before(anext(deltas, None)):
                            computed = True
                            yield delta
                except Lost:
                    history.numerics = history.numerics or booking.numerics
                    raise
        except BaseException:
            if not computed:
                self._router.retract(share, route, decided)
            raise

    async def _route_again(self, share: Request, history: ReplayHistory) -> tuple[Route, float]:
        """A route around what was lost, and when (monotonic) it was chosen. Unlike a new request, which hears at once
        that there is none, one that already runs waits for an engine to come back."""
        give_up = self._clock.monotonic() + self._replay.patience
        while True:
            changed = self._sessions.changed()
            state = self._sessions.state()
            try:
                parted = history.parted(state.engines)
                return self._router.route(share, state, history.excluded, parted, history.numerics), state.now
            except Unavailable as error:
                if not await self._changes_before(changed, give_up):
                    raise history.error or error from error

    def _reconfirm(self, share: Request, booking: Booking, history: ReplayHistory, route: Route) -> Route:
        """The route with the decode engine that is best now; its booking moves along. Raises Lost."""
        state = self._sessions.state()
        try:
            parted = history.parted(state.engines)
            confirmed = self._router.rebind(share, route, state, history.excluded, parted, history.numerics)
        except Unavailable as error:
            raise Lost(error, route.decode, died=False) from error
        if confirmed.decode != route.decode:
            booking.move(confirmed.decode)
        return confirmed

    async def _changes_before(self, changed: asyncio.Event, give_up: float) -> bool:
        """Whether there may be another route before give_up: engines changed, or a lost link may be tried."""
        until = min(give_up, self._sessions.next_link_try() or give_up)
        wait = asyncio.ensure_future(changed.wait())
        patience = asyncio.ensure_future(self._clock.sleep(max(0.0, until - self._clock.monotonic())))
        try:
            await asyncio.wait((wait, patience), return_when=asyncio.FIRST_COMPLETED)
            return self._clock.monotonic() < give_up
        finally:
            wait.cancel()
            patience.cancel()

    def _extend(self, record: RequestRecord, emitted: list[int], delta: TokenDelta) -> None:
        if delta.index != len(emitted):
            raise EngineDied(f"tokens {len(emitted)} to {delta.index} of the answer were lost")
        if len(emitted) < len(_STAMPED):
            for name in _STAMPED[len(emitted) : len(emitted) + len(delta.token_ids)]:
                record.stamp(name, self._clock.unix())
        emitted += delta.token_ids
