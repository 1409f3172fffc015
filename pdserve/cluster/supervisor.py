"""Keeps the desired processes running: carries out what cluster.plan decides and reports what happens."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import structlog

from pdserve.cluster.heartbeat import answers, heartbeats
from pdserve.cluster.incarnation import Incarnation
from pdserve.cluster.launcher import Launcher, LaunchSpec
from pdserve.cluster.member import Member, Phase
from pdserve.cluster.plan import (
    Action,
    BecameReady,
    Drain,
    Ended,
    Event,
    Flipped,
    GiveUp,
    Join,
    Kill,
    Members,
    Paused,
    Retire,
    Return,
    Start,
    Terminate,
    Tick,
    decide,
    endpoints,
    next_wakeup,
)
from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, Role, new_epoch
from pdserve.core.errors import ConfigError, InvalidRequest

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """A process that should run: an engine of a role, or a gateway (None). launch makes the spec of the
    incarnation with the given epoch. ends_first: it needs all others until it has drained."""

    id: str
    role: Role | None
    launch: Callable[[int], LaunchSpec]
    ends_first: bool = False


class Supervisor:
    """Owns every process it started; none is left when `run` has returned or was cancelled.

    on_change is told the endpoint set whenever it differs from before.
    """

    def __init__(
        self,
        desired: Sequence[Desired],
        launcher: Launcher,
        *,
        times: Times,
        clock: Clock,
        on_change: Callable[[tuple[Endpoint, ...]], None],
    ) -> None:
        self._desired = {item.id: item for item in desired}
        self._launcher = launcher
        self._times = times
        self._clock = clock
        self._on_change = on_change
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._incarnations: dict[str, Incarnation] = {}
        self._waiters: list[tuple[Callable[[Members], bool], asyncio.Future[None]]] = []
        self._gave_up: GiveUp | None = None
        self._draining = False
        self.members: Members = {item.id: Member(id=item.id, role=item.role) for item in desired}

    async def run(self) -> None:
        """Supervise until every member is retired and gone. Raises ConfigError when a member that was desired from the
        beginning and never worked refuses its input."""
        async with asyncio.TaskGroup() as processes:
            try:
                await self._supervise(processes)
            finally:
                self.kill_all()
        if self._gave_up:
            raise ConfigError(f"{self._gave_up.id}: {self._gave_up.cause}")

    async def _supervise(self, processes: asyncio.TaskGroup) -> None:
        self._advance(Tick(), processes)
        last = self._clock.monotonic()
        while not (self._gave_up or _all_stopped(self.members, self.members)):
            event = await self._next_event()
            now = self._clock.monotonic()
            if now - last > 2 * self._times.heartbeat:
                self._advance(Paused(seconds=now - last), processes)
            last = now
            self._advance(event, processes)

    async def until(self, holds: Callable[[Members], bool]) -> None:
        """Return once the members satisfy a condition; for callers beside `run`."""
        if holds(self.members):
            return
        reached = asyncio.get_running_loop().create_future()
        waiter = (holds, reached)
        self._waiters.append(waiter)
        try:
            await reached
        finally:
            self._waiters.remove(waiter)

    async def drain(self) -> None:
        """Let fronts and then gateways finish what they serve, then engines what they run and lease, then end all.
        Each may take times.drain_timeout; whatever is left times.fence after that is killed."""
        ids = list(self._desired)
        self._draining = True
        try:
            async with asyncio.timeout(self._times.drain_timeout + self._times.fence):
                for _, together in groupby(sorted(ids, key=self._turn), self._turn):
                    await self._retire(list(together))
        except TimeoutError:
            _log.warning("drain timed out, killing what is left", timeout=self._times.drain_timeout)
            self.kill_all()
            await self._retire(ids)

    def _turn(self, id: str) -> tuple[bool, bool]:
        """When it ends: what others need goes after them."""
        desired = self._desired[id]
        return not desired.ends_first, desired.role is not None

    def join(self, newcomer: Desired) -> None:
        """Start an engine that did not exist, and keep it running. Its id must be new."""
        self._desired[newcomer.id] = newcomer
        self._events.put_nowait(Join(id=newcomer.id, role=_role(newcomer)))

    def flipped(self, engine: Desired) -> None:
        """A running engine has taken another role: how it is started again from now on."""
        self._desired[engine.id] = engine
        self._events.put_nowait(Flipped(id=engine.id, role=_role(engine)))

    def knows(self, id: str) -> bool:
        """Whether there is, or was, a process of that id."""
        return id in self._desired

    def drain_engine(self, engine_id: str, *, returns: bool) -> None:
        """Have one engine drain and end, and then stay away or start again. Raises InvalidRequest when there is none
        of that name."""
        self._check_engine(engine_id)
        self._events.put_nowait(Drain(id=engine_id, returns=returns))

    def return_engine(self, engine_id: str) -> None:
        """Start an engine that was drained and stays away. Raises InvalidRequest when there is none of that name."""
        self._check_engine(engine_id)
        self._events.put_nowait(Return(id=engine_id))

    def _check_engine(self, engine_id: str) -> None:
        desired = self._desired.get(engine_id)
        if desired is None or desired.role is None:
            raise InvalidRequest(f"there is no engine {engine_id[:200]!r}", "engine")

    def kill_all(self) -> None:
        """End every process at once."""
        for incarnation in self._incarnations.values():
            incarnation.kill()

    async def _retire(self, ids: Collection[str]) -> None:
        self._events.put_nowait(Retire(ids=tuple(ids)))
        await self.until(partial(_all_stopped, ids))

    async def _next_event(self) -> Event:
        """The next event, or a Tick when a deadline passes. Wakes at least once per heartbeat, so that
        a longer gap proves that this process itself was not running."""
        wakeup = next_wakeup(self.members, self._times)
        wait = self._times.heartbeat
        if wakeup is not None:
            wait = min(wait, max(0.0, wakeup - self._clock.monotonic()))
        try:
            async with asyncio.timeout(wait):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    def _advance(self, event: Event, processes: asyncio.TaskGroup) -> None:
        before = self.members
        self.members, actions = decide(before, event, self._clock.monotonic(), self._times, new_epoch)
        _report(event, before, self.members)
        for action in actions:
            self._carry_out(action, processes)
        if endpoints(self.members) != endpoints(before):
            self._on_change(endpoints(self.members))
        for holds, reached in self._waiters:
            if not reached.done() and holds(self.members):
                reached.set_result(None)

    def _carry_out(self, action: Action, processes: asyncio.TaskGroup) -> None:
        match action:
            case Start():
                desired = self._desired[action.id]
                signs = partial(answers, every=self._times.heartbeat) if desired.role is None else heartbeats
                incarnation = Incarnation(action.id, action.epoch, signs=signs, emit=self._events.put_nowait)
                self._incarnations[action.id] = incarnation
                processes.create_task(incarnation.run(self._launcher, desired.launch(action.epoch)))
            case Kill():
                _log.error("killing", process=action.id, reason=action.reason)
                self._incarnations[action.id].kill()
            case Terminate():
                self._incarnations[action.id].terminate()
            case GiveUp() if not self._draining:  # else requests still run, and all end anyway
                self._gave_up = action


def _all_stopped(ids: Iterable[str], members: Members) -> bool:
    return all(id in members and members[id].phase is Phase.STOPPED for id in ids)


def _role(engine: Desired) -> Role:
    if engine.role is None:
        raise ValueError(f"{engine.id} is no engine")
    return engine.role


def _report(event: Event, before: Members, after: Members) -> None:
    """Log what operators want to see of an event."""
    match event:
        case BecameReady():
            _log.info("ready", process=event.id, pid=after[event.id].pid, address=event.address)
        case Ended():
            member = after[event.id]
            if before[event.id].phase is Phase.DRAINING:
                _log.info("drained", process=event.id, cause=event.cause, returns=member.phase is Phase.DOWN)
            elif member.phase is Phase.DOWN:
                delay = member.due - member.since
                _log.error(
                    "died", process=event.id, cause=event.cause, deaths=member.deaths, restart_in=round(delay, 1)
                )
            else:
                _log.info("stopped", process=event.id, cause=event.cause)
        case Paused():
            _log.warning("the supervisor did not run", seconds=round(event.seconds, 1))
    for id, member in after.items():
        if member.phase is Phase.SUSPECT and before[id].phase is not Phase.SUSPECT:
            _log.warning("silent", process=id, pid=member.pid)
        if member.phase is Phase.READY and before[id].phase is Phase.SUSPECT:
            _log.info("heard again", process=id, pid=member.pid)
