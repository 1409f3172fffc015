"""The door to the engines: who goes now, who waits, who is turned away. The decisions are router.admission's.

A request is routed, and booked on its engines, in the same breath in which it is let in, so the next decision sees it.
Those that wait are looked at again when an engine has told its load, when a prompt is computed, when a request ends,
and when an engine should be free; a route is chosen anew only for one that may go, and once a second. Replays do not
come through here: their clients already have part of an answer, and they have a rate of their own (dispatch.replay).
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from pdserve.core.admission import Admission, Rejection, TenantRules
from pdserve.core.clock import Clock
from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.errors import DeadlineExceeded, Overloaded, PdserveError, Unavailable
from pdserve.core.request import Request
from pdserve.dispatch.demand import Held
from pdserve.dispatch.sessions import SessionPool
from pdserve.dispatch.tenant_limits import LimitReached, TenantCounters, TenantLimits
from pdserve.dispatch.usage import Foreseen, engine_seconds, usage_of
from pdserve.router.admission import AdmissionRules, Outlook, Verdict, busy_for, judge, look_ahead
from pdserve.router.fair_queue import FairQueue, Waiting
from pdserve.router.pace import Pace
from pdserve.router.router import Router
from pdserve.router.wait_error import WaitError
from pdserve.telemetry.record import RequestRecord

_LOOK_AGAIN = 1.0
"""Seconds after which those that wait are looked at again though nothing was heard of any engine."""
_LATELY = 30.0
"""Seconds for which a tenant that has asked is reckoned with."""
_LEAST_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class _Choice:
    ask: RouteAsk
    route: Route
    outlook: Outlook
    state: ClusterState


@dataclass(slots=True)
class _Asking:
    """A request that waits, and what was chosen for it last."""

    request: Request
    choice: _Choice


class AdmissionGate:
    """Lets the requests of one gateway in."""

    def __init__(
        self,
        sessions: SessionPool,
        router: Router,
        clock: Clock,
        rules: AdmissionRules | None = None,
        tenants: Mapping[str, TenantRules] | None = None,
        counters: TenantCounters | None = None,
    ) -> None:
        self._sessions = sessions
        self._router = router
        self._clock = clock
        self._rules = rules or AdmissionRules()
        tenants = tenants or {}
        self._limits = TenantLimits(tenants, clock, counters)
        self._queue: FairQueue[asyncio.Future[_Choice]] = FairQueue(
            {name: tenant.weight for name, tenant in tenants.items()}, credit=self._rules.credit
        )
        self._asking: dict[asyncio.Future[_Choice], _Asking] = {}
        self._paces: dict[tuple[str, int], Pace] = {}
        self._asked: dict[str, float] = {}
        """Tenant → when it last asked (monotonic); the longest ago first."""
        self._error = WaitError(self._rules.ttft)
        self._called: Request | None = None
        """It was let in and is not booked yet."""
        self._timer: asyncio.TimerHandle | None = None
        self.patience = 0.0
        """Seconds a new request waits for an engine where there is none."""
        self._knocking = 0
        sessions.on_load.append(self.look)

    def waiting(self) -> dict[str, int]:
        """How many requests wait, by tenant."""
        return self._queue.by_tenant()

    def held(self) -> Held:
        """What waits here, for the scaler."""
        work = sum(waiting.cost for waiting in self._queue)
        return Held(requests=len(self._queue) + self._knocking, seconds=work, knocking=self._knocking)

    @asynccontextmanager
    async def visit(self, request: Request, record: RequestRecord) -> AsyncIterator["Visit"]:
        """A request from its arrival to its end, within its tenant's limits. Raises RateLimited."""
        try:
            async with self._limits.inside(request.tenant, request.id):
                visit = Visit(self, request, record)
                try:
                    yield visit
                finally:
                    visit.close()
        except LimitReached as error:
            record.admission = self._note(request, Verdict(0.0, error.rejection), None)
            raise

    async def admit(self, request: Request, record: RequestRecord, expires: float) -> _Choice:
        """The request's turn; the caller books it before it waits for anything else. expires: in event-loop seconds.

        Raises Unavailable when no engine can serve it, Overloaded, or DeadlineExceeded."""
        began = self._clock.monotonic()
        self._asked.pop(request.tenant, None)
        self._asked[request.tenant] = began
        choice = await self._first_choice(request, expires)
        if not self._rules.enabled or (not self._queue and self._called is None and choice.outlook.goes()):
            record.admission = self._note(request, Verdict(0.0), choice.outlook, waited=0.0)
            return choice
        verdict = self._judge(request, choice.outlook)
        record.admission = self._note(request, verdict, choice.outlook)
        if verdict.rejection:
            raise Overloaded(_refusal(verdict, record.admission, self._error.ratio), retry_after=verdict.retry_after)
        try:
            choice = await self._turn_at_last(request, choice, expires)
            record.stamp("admitted", self._clock.unix())
            return choice
        except TimeoutError:
            record.admission.rejection = Rejection.DEADLINE
            raise DeadlineExceeded(f"the request's turn did not come in {request.timeout:g} s") from None
        finally:
            record.admission.waited = self._clock.monotonic() - began

    def send(self, request: Request, choice: _Choice) -> None:
        """The request goes to its engines: its tenant is charged."""
        self._queue.serve(request.tenant, choice.outlook.work)
        self._router.expect(request, choice.route, choice.state)

    def settled(self, request: Request) -> None:
        """It is on the engines' books, or has ended: the next may be looked at."""
        if self._called is request:
            self._called = None
        self.look()

    def charge(self, request: Request, record: RequestRecord, foreseen: Foreseen, output_tokens: int) -> None:
        """The request ends: note what it took, and charge its tenant for what was not foreseen."""
        record.usage = usage_of(record, foreseen, output_tokens, self._clock.unix())
        extra = engine_seconds(record.usage, foreseen.num_blocks) - foreseen.work
        self._queue.correct(request.tenant, extra)

    def first_token(self, admission: Admission, seconds: float) -> None:
        """Of a request that was let in, so long after it came, from the engines it was sent to."""
        if admission.waited and admission.predicted_ttft > 0:
            self._error.seen(admission.predicted_ttft, seconds)
        self.look()

    def look(self, fresh: _Choice | None = None) -> None:
        """Let the next one in if it may go, one at a time. fresh: made for the first of them in this breath."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._called is None and (head := self._queue.first()):
            asking = self._asking[head.item]
            if head.item.cancelled():  # it leaves, but has not come to run yet
                self._leave(head, served=False)
                continue
            owed = self._queue.is_owed(head.tenant)
            if asking.choice is not fresh:
                state = self._sessions.state()
                if busy := self._busy_for(asking.choice, state, owed):
                    self._look_in(busy)
                    return
                try:
                    asking.choice = self._choose(asking.request, state)
                except PdserveError as error:
                    self._leave(head, served=False)
                    head.item.set_exception(error)
                    continue
            outlook = asking.choice.outlook
            if not outlook.goes(owed=owed):
                self._look_in(outlook.idle_in if outlook.idle_in > 0 else _LOOK_AGAIN)
                return
            self._leave(head, served=True)
            self._called = asking.request
            head.item.set_result(asking.choice)

    def _busy_for(self, choice: _Choice, state: ClusterState, owed: bool) -> float | None:
        """Seconds for which nothing need be chosen anew. Looking is a small part of choosing, and those that wait are
        looked at far more often than they can go."""
        if state.now - choice.state.now >= _LOOK_AGAIN:
            return None
        contested = self._is_contested(state.now)
        return busy_for(choice.route, choice.state, state, self._rules, contested=contested, owed=owed)

    def _look_in(self, seconds: float) -> None:
        pause = min(max(seconds, _LEAST_PAUSE), _LOOK_AGAIN)
        self._timer = asyncio.get_running_loop().call_later(pause, self.look)

    async def _turn_at_last(self, request: Request, choice: _Choice, expires: float) -> _Choice:
        """Its turn, though engines may go while it waits: for those that come it waits as who comes then does."""
        while True:
            try:
                return await self._turn(request, choice, expires)
            except Unavailable:
                choice = await self._first_choice(request, expires)

    async def _turn(self, request: Request, choice: _Choice, expires: float) -> _Choice:
        turn: asyncio.Future[_Choice] = asyncio.get_running_loop().create_future()
        self._asking[turn] = _Asking(request, choice)
        waiting = self._queue.push(turn, tenant=request.tenant, priority=request.priority, cost=choice.outlook.work)
        self._pace(request).came(self._clock.monotonic())
        if self._queue.first() is waiting:  # who was first before has been looked at
            self.look(choice)
        try:
            async with asyncio.timeout_at(expires):
                return await turn
        except BaseException:
            if turn in self._asking:
                self._leave(waiting, served=False)
            self.settled(request)
            raise

    def _leave(self, waiting: Waiting[asyncio.Future[_Choice]], *, served: bool) -> None:
        request = self._asking.pop(waiting.item).request
        self._queue.leave(waiting)
        self._pace(request).left(self._clock.monotonic(), served=served)

    async def _first_choice(self, request: Request, expires: float) -> _Choice:
        """As soon as an engine can serve the request. Raises Unavailable when none can within patience."""
        loop = asyncio.get_running_loop()
        give_up = min(expires, loop.time() + self.patience)
        while True:
            try:
                return self._choose(request, self._sessions.state())
            except Unavailable:
                if loop.time() >= give_up:
                    raise
            self._knocking += 1
            try:
                async with asyncio.timeout_at(give_up):
                    await self._sessions.changed().wait()
            except TimeoutError:
                pass
            finally:
                self._knocking -= 1

    def _choose(self, request: Request, state: ClusterState) -> _Choice:
        ask, route = self._router.choose(request, state)
        return _Choice(
            ask, route, look_ahead(ask, route, state, self._rules, contested=self._is_contested(state.now)), state
        )

    def _judge(self, request: Request, outlook: Outlook) -> Verdict:
        ahead = self._queue.ahead(request.tenant, request.priority)
        pace = self._pace(request).seconds(ahead.own, self._clock.monotonic())
        rules = replace(self._rules, ttft=self._rules.ttft / self._error.ratio)
        verdict = judge(outlook, rules, ahead=ahead.cost, pace=pace, timeout=request.timeout)
        if verdict.rejection is None and ahead.own >= self._rules.max_waiting:
            return Verdict(verdict.wait, Rejection.QUEUE, max(1.0, pace / ahead.own))
        return verdict

    def _is_contested(self, now: float) -> bool:
        """Whether more than one tenant has asked of late."""
        while self._asked and now - next(iter(self._asked.values())) > _LATELY:
            del self._asked[next(iter(self._asked))]
        return len(self._asked) > 1

    def _pace(self, request: Request) -> Pace:
        return self._paces.setdefault((request.tenant, request.priority), Pace(at=self._clock.monotonic()))

    def _note(
        self, request: Request, verdict: Verdict, outlook: Outlook | None, waited: float | None = None
    ) -> Admission:
        return Admission(
            tenant=request.tenant,
            priority=request.priority,
            ahead=round(self._queue.ahead(request.tenant, request.priority).requests),
            predicted_wait=verdict.wait,
            predicted_ttft=verdict.wait + (outlook.own if outlook else 0.0),
            ttft_target=self._rules.ttft,
            waited=waited,
            rejection=verdict.rejection,
        )


class Visit:
    """One request at the gate, until it ends."""

    def __init__(self, gate: AdmissionGate, request: Request, record: RequestRecord) -> None:
        self._gate = gate
        self._request = request
        self._record = record
        self._came = asyncio.get_running_loop().time()
        self._expires = self._came + request.timeout
        self._foreseen: Foreseen | None = None
        self._tokens = 0

    async def route(self) -> tuple[Route, float]:
        """Its route, when it is its turn, and when (monotonic) that was chosen. To be booked at once. Raises as
        AdmissionGate.admit does."""
        choice = await self._gate.admit(self._request, self._record, self._expires)
        self._gate.send(self._request, choice)
        self._foreseen = Foreseen.of(choice.outlook.work, choice.ask, choice.route, choice.state)
        return choice.route, choice.state.now

    def booked(self) -> None:
        """Its load is on the engines' books."""
        self._gate.settled(self._request)

    def tokens(self, count: int) -> None:
        """So many have come. With the first its prompt is off its engine."""
        if not self._tokens and self._record.admission and not self._record.failed:
            self._gate.first_token(self._record.admission, asyncio.get_running_loop().time() - self._came)
        self._tokens += count

    def close(self) -> None:
        """It has ended, and its load is booked no more."""
        if self._foreseen:
            self._gate.charge(self._request, self._record, self._foreseen, self._tokens)
        self._gate.settled(self._request)


def _refusal(verdict: Verdict, admission: Admission, error: float) -> str:
    if verdict.rejection is Rejection.QUEUE:
        return "too many requests wait already; try again later"
    when = f"the first token would come in about {admission.predicted_ttft * error:.1f} s"
    if verdict.rejection is Rejection.DEADLINE:
        return f"{when}, which is later than the client waits; try again later"
    return f"{when}, too late to be sure of the {admission.ttft_target:g} s promised; try again later"
