"""Carries decisions out and keeps them, so that one can ask why there are as many engines as there are."""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import structlog

from pdserve.core.clock import Clock
from pdserve.core.endpoint import Role
from pdserve.core.errors import PdserveError
from pdserve.scaler import controller
from pdserve.scaler.controller import Now, Outcome
from pdserve.scaler.decision import Action, Decision, FlipRole, Replicas, Scale, SetBypass, Speed
from pdserve.scaler.demand import Demand
from pdserve.scaler.memory import Memory, remember
from pdserve.scaler.orders import Orders
from pdserve.scaler.policy import Policy

_log = structlog.get_logger(__name__)

Decide = Callable[[Policy, Memory, Demand, Mapping[Role, Replicas], Now], Outcome]
"""As controller.decide."""


class Cloud(Protocol):
    """Whoever owns engines. Implementations: the supervisor's processes, those on Ray nodes in pods, pods that are
    engines, simulated engines. Held to tests/contract/test_clouds.py."""

    def pools(self) -> Mapping[Role, Replicas]:
        """Of every role there may be engines of."""
        ...

    def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> Awaitable[None]:
        """From now on the pool is to have so many. Engines that leave drain first, those of victims before others.
        Returns when that has begun. Raises PdserveError."""
        ...

    def flip(self, engine_id: str, role: Role) -> Awaitable[None]:
        """Give a running engine another role; it counts to that pool from now on. Raises PdserveError."""
        ...


class Scaler:
    """One policy over one cloud. The policy may be exchanged at any time."""

    def __init__(
        self,
        policy: Policy,
        cloud: Cloud,
        clock: Clock,
        *,
        keep: int = 256,
        decide: Decide = controller.decide,
        tell: Callable[[Decision], None] = lambda decision: None,
        done: Callable[[Decision, PdserveError | None], None] = lambda decision, failure: None,
    ) -> None:
        """keep: decisions that can be asked for later; one that changes nothing, in a dry run or because it fails, is
        tried again and kept once. tell is called with each that is kept, before it is carried out, and done whenever
        one was, with what kept it from that."""
        self.policy = policy
        self._cloud = cloud
        self._clock = clock
        self._decide = decide
        self._tell = tell
        self._done = done
        self._memory = Memory(busy_at=clock.monotonic())
        self.orders = Orders() if policy.dry_run else _orders(policy, bypass=0)
        """What gateways are to do now."""
        self.decisions: deque[Decision] = deque(maxlen=keep)
        self.failures: dict[str, int] = {}
        """Error code → actions that could not be carried out."""
        self.latest_failure = ""
        """Why the latest of them could not be; empty once one was carried out again."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(speed, rule) → decisions that changed something, or would have."""
        self.latest: Outcome | None = None
        self._in_vain: dict[tuple[Speed, Role | None], tuple[Action, bool]] = {}
        """By what is changed: the last decision, if it has changed nothing, and whether that was a dry run."""

    def remember(self, demand: Demand) -> None:
        """What was measured while nothing can be decided: later decisions know when there last was a request, and the
        series of the forecast has no gap."""
        self._memory = remember(self._memory, demand, self.policy, self._clock.monotonic())

    async def step(self, demand: Demand) -> Orders:
        """Decide on what was measured since the last step, carry it out, and tell what gateways are to do."""
        now = Now(monotonic=self._clock.monotonic(), unix=self._clock.unix())
        before = self._memory
        outcome = self._decide(self.policy, before, demand, self._cloud.pools(), now)
        self._memory, self.latest = outcome.memory, outcome
        for decision in outcome.decisions:
            subject, said = (decision.speed, decision.role), (decision.action, decision.dry_run)
            if self._in_vain.get(subject) != said:
                self.decisions.append(decision)
                self.counts[decision.speed.value, decision.rule] += 1
                self._tell(decision)
            if decision.dry_run:
                self._in_vain[subject] = said
            elif await self._carry_out(decision):
                self._in_vain.pop(subject, None)
            else:
                self._in_vain[subject] = said
                self._memory = _undone(decision.action, self._memory, before)
        if not self.policy.dry_run:
            self.orders = _orders(self.policy, self._memory.bypass)
        return self.orders

    async def _carry_out(self, decision: Decision) -> bool:
        """Whether that worked."""
        try:
            match decision.action:
                case Scale(role=role, engines=engines, victims=victims):
                    await self._cloud.scale(role, engines, victims)
                case FlipRole(engine_id=engine_id, role=role):
                    await self._cloud.flip(engine_id, role)
        except PdserveError as error:
            self.failures[error.code] = self.failures.get(error.code, 0) + 1
            self.latest_failure = str(error)
            _log.error("scaling failed", code=error.code, cause=str(error), rule=decision.rule)
            self._done(decision, error)
            return False
        if not isinstance(decision.action, SetBypass):
            self.latest_failure = ""
        self._done(decision, None)
        return True


def _undone(action: Action, memory: Memory, before: Memory) -> Memory:
    """The memory without what was not done: no cooldown begins with it."""
    match action:
        case Scale(role=role):
            was = before.pool(role)
            pool = replace(memory.pool(role), raised_at=was.raised_at, lowered_at=was.lowered_at)
            return replace(memory, pools={**memory.pools, role: pool})
        case FlipRole():
            return replace(memory, flipped_at=before.flipped_at)
    return memory


def _orders(policy: Policy, bypass: int) -> Orders:
    pools = policy.pools.by_role().values()
    sleeps = any(0 in (pool.min, *(schedule.min for schedule in pool.schedules)) for pool in pools)
    return Orders(bypass_below=bypass, patience=policy.scale_to_zero.patience if sleeps else 0.0)
