"""A simulated cloud: engines take a while to start, drain before they end, and cost while they are there."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field

from pdserve.core.clock import Clock
from pdserve.core.endpoint import Role
from pdserve.scaler import controller
from pdserve.scaler.decision import Decision, Replicas
from pdserve.scaler.policy import Policy
from pdserve.scaler.runner import Decide
from pdserve.simulator.cluster import SimCluster


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSpec:
    """Engines come and go by a policy. warm_up: seconds from asking for one until it serves. decide: another rule than
    the controller's, to compare with."""

    policy: Policy
    warm_up: float = 60.0
    decide: Decide = controller.decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """How many engines of a role were there from a second of the run on. ready: of them, those that serve."""

    at: float
    role: Role
    wanted: int
    ready: int


@dataclass(slots=True, kw_only=True)
class ScalingReport:
    """engine_seconds: by role, of each engine from its start to its end or to the last request's arrival, warming and
    draining included; a flipped engine counts to each role while it had it."""

    engine_seconds: dict[Role, float] = field(default_factory=dict)
    timeline: list[Moment] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.engine_seconds.values())

    def rules(self) -> dict[str, int]:
        """Which rules settled how many decisions, by speed."""
        fired = Counter(f"{decision.speed}: {decision.rule}" for decision in self.decisions)
        return dict(sorted(fired.items()))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "engine_seconds": {role.value: seconds for role, seconds in self.engine_seconds.items()},
            "rules": self.rules(),
            "timeline": [asdict(moment) for moment in self.timeline],
            "decisions": [{"speed": each.speed.value, **asdict(each)} for each in self.decisions],
            "failures": self.failures,
        }


class SimCloud:
    """scaler.runner.Cloud over a SimCluster."""

    def __init__(self, cluster: SimCluster, clock: Clock, warm_up: float, now: Callable[[], float]) -> None:
        """now: seconds of the run, for the report."""
        self.report = ScalingReport()
        self._cluster = cluster
        self._clock = clock
        self._warm_up = warm_up
        self._now = now
        self._starting: dict[str, tuple[Role, asyncio.Task[None]]] = {}
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._since: dict[str, tuple[Role, float]] = {}
        self._numbers: Counter[Role] = Counter()
        self._counting = True

    async def begin(self, engines: Mapping[Role, int]) -> None:
        """The engines that are there at the start."""
        for role, count in engines.items():
            for _ in range(count):
                await self._cluster.start(self._name(role), role)

    def count_from_now(self) -> None:
        """The load begins."""
        for engine_id, engine in self._cluster.engines.items():
            self._count(engine_id, engine.engine.endpoint.role)
        self._note()

    def stop_counting(self) -> None:
        """The last request has come: what is there from now on is no cost of the load."""
        self._counting = False
        for engine_id in list(self._since):
            self._settle(engine_id)

    def pools(self) -> Mapping[Role, Replicas]:
        ready = Counter(role for engine_id, role in self._roles().items() if engine_id not in self._draining)
        warming = Counter(role for role, _ in self._starting.values())
        return {
            role: Replicas(wanted=ready[role] + warming[role], ready=ready[role], warming=warming[role])
            for role in Role
        }

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        surplus = self.pools()[role].wanted - engines
        for _ in range(-surplus):
            engine_id = self._name(role)
            self._count(engine_id, role)
            self._starting[engine_id] = role, self._spawn(self._boot(engine_id, role))
        for engine_id in self._leaving(role, victims)[: max(0, surplus)]:
            if starting := self._starting.pop(engine_id, None):
                starting[1].cancel()
                self._settle(engine_id)
            else:
                self._draining[engine_id] = self._spawn(self._drain(engine_id))
        self._note()

    async def flip(self, engine_id: str, role: Role) -> None:
        self._settle(engine_id)
        self._count(engine_id, role)
        self._cluster.flip(engine_id, role)
        self._note()

    async def close(self) -> None:
        """Nothing starts or drains any more, and the account is closed."""
        tasks = [task for _, task in self._starting.values()] + list(self._draining.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.stop_counting()

    async def _boot(self, engine_id: str, role: Role) -> None:
        await self._clock.sleep(self._warm_up)
        del self._starting[engine_id]
        await self._cluster.start(engine_id, role)
        self._note()

    async def _drain(self, engine_id: str) -> None:
        await self._cluster.drain(engine_id)
        self._settle(engine_id)
        del self._draining[engine_id]

    def _roles(self) -> dict[str, Role]:
        return {engine_id: engine.engine.endpoint.role for engine_id, engine in self._cluster.engines.items()}

    def _leaving(self, role: Role, victims: tuple[str, ...]) -> list[str]:
        """Those that do not serve yet, then the victims, then the newest."""
        starting = [engine_id for engine_id, (of, _) in self._starting.items() if of is role]
        ready = [e for e, of in self._roles().items() if of is role and e not in self._draining]
        chosen = [engine_id for engine_id in victims if engine_id in ready]
        return [*reversed(starting), *chosen, *(e for e in reversed(ready) if e not in chosen)]

    def _name(self, role: Role) -> str:
        number = self._numbers[role]
        self._numbers[role] += 1
        return f"{role.value}-{number}"

    def _count(self, engine_id: str, role: Role) -> None:
        if self._counting:
            self._since[engine_id] = role, self._now()

    def _settle(self, engine_id: str) -> None:
        role, since = self._since.pop(engine_id, (None, 0.0))
        if role is not None:
            seconds = self.report.engine_seconds
            seconds[role] = seconds.get(role, 0.0) + self._now() - since

    def _note(self) -> None:
        for role, pool in self.pools().items():
            if pool.wanted or any(moment.role is role for moment in self.report.timeline):
                self.report.timeline.append(Moment(at=self._now(), role=role, wanted=pool.wanted, ready=pool.ready))

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        return asyncio.get_running_loop().create_task(work)
