"""Moving running requests: away from engines that drain, to even out load, and whenever an operator asks for it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import structlog

from pdserve.core.clock import Clock
from pdserve.core.cluster import EngineKey
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import Cancelled, InvalidRequest, PdserveError, Unavailable
from pdserve.dispatch.booking import Booking
from pdserve.dispatch.decoding import Decoding
from pdserve.dispatch.replay import Lost
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.rebalancing import Move
from pdserve.router.router import Router
from pdserve.telemetry.record import MoveReason

_log = structlog.get_logger(__name__)

_NEWEST = 0.2
"""Weight of the last move's pause among earlier ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRules:
    """deadline: seconds one move may take, until the target's first token. at_once: moves from one engine at a time,
    so that each is short. tries: moves of one request that may fail; then it stays, and is replayed when the engine
    ends. pause: seconds between two of them, and between two looks for an engine that has room, or for load to even
    out. rest: seconds in which a request that has moved does not move again for the sake of load."""

    deadline: float = 10.0
    at_once: int = 4
    tries: int = 3
    pause: float = 0.5
    rest: float = 5.0


@dataclass(slots=True, eq=False)
class _Movable:
    decoding: Decoding
    booking: Booking
    task: asyncio.Task[None] | None = None
    failures: int = 0
    rests_until: float = -inf


class Migrator:
    """Knows what decodes where, through one gateway."""

    def __init__(
        self, sessions: SessionPool, router: Router, clock: Clock, rules: MigrationRules | None = None
    ) -> None:
        self._sessions = sessions
        self._router = router
        self._clock = clock
        self._rules = rules or MigrationRules()
        self._movables: dict[_Movable, None] = {}
        """Oldest first."""
        self._turns: defaultdict[EngineKey, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self._rules.at_once)
        )
        self._balancing: asyncio.Task[None] | None = None
        self._look_at = self._moved_at = -inf
        self._pause: float | None = None
        """Seconds that clients of moved requests have waited lately."""
        sessions.on_draining.append(self._move_away)
        if router.rebalances:
            sessions.on_load.append(self._even_out)

    @asynccontextmanager
    async def movable(self, booking: Booking, decoding: Decoding) -> AsyncGenerator[None]:
        """The request decodes, and may be moved meanwhile."""
        movable = _Movable(decoding, booking)
        self._movables[movable] = None
        self._consider(movable)
        try:
            yield
        finally:
            del self._movables[movable]
            if movable.task:
                movable.task.cancel()
                await asyncio.gather(movable.task, return_exceptions=True)

    async def move(self, request_id: str) -> None:
        """Move a request to the best other engine, now. Raises InvalidRequest when it does not decode, Unavailable
        when there is nowhere to go, Lost or PdserveError as Decoding.move does."""
        movable = next((each for each in self._movables if each.decoding.request_id == request_id), None)
        if movable is None:
            raise InvalidRequest(f"no request {request_id[:200]!r} decodes now", "request")
        if movable.task is not None:
            raise Unavailable(f"{request_id} is moving already")
        target = self._router.move(movable.decoding.request, self._where(movable), self._sessions.state())
        task = movable.task = asyncio.get_running_loop().create_task(self._move_once(movable, target))
        await asyncio.wait([task])
        if task.cancelled():
            raise Cancelled(f"{request_id} ended before it had moved")
        task.result()

    async def _move_once(self, movable: _Movable, target: Endpoint) -> None:
        try:
            await self._carry(movable, target, MoveReason.ORDER)
        finally:
            movable.task = None
            self._consider(movable)

    def _move_away(self) -> None:
        for movable in self._movables:
            self._consider(movable)
        for key in self._turns.keys() - self._sessions.draining:
            del self._turns[key]

    def _consider(self, movable: _Movable) -> None:
        idle = movable in self._movables and movable.task is None
        if idle and self._where(movable) in self._sessions.draining:
            movable.task = asyncio.get_running_loop().create_task(self._leave(movable))

    async def _leave(self, movable: _Movable) -> None:
        """Move the request until it is where nobody drains, or was not able to."""
        try:
            movable.failures = 0
            while movable.failures < self._rules.tries and (source := self._where(movable)) in self._sessions.draining:
                changed = self._sessions.changed()
                try:
                    async with self._turns[source]:
                        tried = await self._try_to_leave(movable, source)
                except (Lost, PdserveError) as failure:
                    movable.failures += 1
                    self._note(source, failure)
                    await self._clock.sleep(self._rules.pause)
                else:
                    if not tried:
                        await _first(changed.wait(), self._clock.sleep(self._rules.pause))
        finally:
            movable.task = None

    async def _try_to_leave(self, movable: _Movable, source: EngineKey) -> bool:
        """False at once when nobody has room: it decodes on and waits for that outside its turn, so that a smaller
        request may find some meanwhile."""
        try:
            target = self._router.move(movable.decoding.request, source, self._sessions.state())
        except Unavailable:
            return False
        await self._carry(movable, target, MoveReason.DRAIN)
        return True

    def _even_out(self) -> None:
        """Begin the move that evens out load most, if there is one and none is under way."""
        now = self._clock.monotonic()
        if (self._balancing and not self._balancing.done()) or now < self._look_at:
            return
        self._look_at = now + self._rules.pause
        free = [each for each in self._movables if self._may_move(each, now)]
        runners = {runner.request_id: (each, runner) for each in free if (runner := each.booking.decoding)}
        if not runners:
            return
        state = self._sessions.state()
        move = self._router.rebalance([runner for _, runner in runners.values()], state, self._pause, self._moved_at)
        if move is not None:
            movable, _ = runners[move.request_id]
            movable.task = self._balancing = asyncio.get_running_loop().create_task(self._rebalance(movable, move))

    def _may_move(self, movable: _Movable, now: float) -> bool:
        return movable.task is None and movable.rests_until <= now and movable.failures < self._rules.tries

    async def _rebalance(self, movable: _Movable, move: Move) -> None:
        source = self._where(movable)
        try:
            await self._carry(movable, move.target, MoveReason.REBALANCE, move.why)
        except (Lost, PdserveError) as failure:
            movable.failures += 1
            self._note(source, failure)
        finally:
            movable.task = None
            self._consider(movable)

    async def _carry(self, movable: _Movable, target: Endpoint, reason: MoveReason, why: str = "") -> None:
        try:
            migration = await movable.decoding.move(target, movable.booking, self._rules.deadline, reason, why)
        finally:
            self._moved_at = self._clock.monotonic()
            movable.rests_until = self._moved_at + self._rules.rest
        if migration.pause is not None:
            before = migration.pause if self._pause is None else self._pause
            self._pause = before + _NEWEST * (migration.pause - before)

    def _note(self, source: EngineKey, failure: Lost | PdserveError) -> None:
        error = failure.error if isinstance(failure, Lost) else failure
        if isinstance(failure, Lost) and failure.link:
            self._sessions.link_lost(failure.link)
        if isinstance(failure, Lost) and failure.damaging:
            self._sessions.link_damaged(failure.damaging)
        _log.warning("a request could not move", source=source[0], code=error.code, cause=str(error))

    def _where(self, movable: _Movable) -> EngineKey:
        engine = movable.decoding.engine
        return engine.engine_id, engine.epoch


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when one of them has."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
