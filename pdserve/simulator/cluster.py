"""The simulated supervisor: starts engines, carries out faults, fences the frozen, restarts the dead."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import EngineDied
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.sessions import Connection
from pdserve.simulator.connection import SimConnection
from pdserve.simulator.engines import EngineFactory, SimEngine, shut_down


class FaultKind(StrEnum):
    """KILL: gone at once. FREEZE: stopped, as by SIGSTOP, until thawed or fenced."""

    KILL = "kill"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """at: seconds after the start of load. lasts: seconds until a killed engine has been started again, or a
    frozen one goes on; None: a killed one never returns, a frozen one is fenced and started again."""

    at: float
    engine_id: str
    kind: FaultKind = FaultKind.KILL
    lasts: float | None = None


class SimCluster:
    """Engines by id. on_change(endpoints) is what a registry would publish."""

    def __init__(
        self, factory: EngineFactory, rng: Random, clock: Clock, on_change: Callable[[tuple[Endpoint, ...]], None]
    ) -> None:
        self.engines: dict[str, SimEngine] = {}
        self._factory = factory
        self._rng = rng
        self._clock = clock
        self._on_change = on_change
        self._watchers: list[asyncio.Task[None]] = []
        self._draining: set[str] = set()
        self.failures: list[EngineDied] = []
        """Engines that ended although nobody ended them: bugs."""

    async def start(self, engine_id: str, role: Role) -> None:
        engine = self._factory.build(engine_id, role, self._rng.getrandbits(64) or 1)
        await engine.engine.__aenter__()
        self.engines[engine_id] = engine
        self._watchers.append(asyncio.get_running_loop().create_task(self._watch(engine)))
        self._publish()

    async def drain(self, engine_id: str) -> None:
        """Have an engine finish or hand on what it has, and end. Returns when it has ended."""
        engine = self.engines[engine_id]
        self._draining.add(engine_id)
        self._publish()
        await engine.engine.drain(self._factory.times.drain_timeout)
        self._draining.discard(engine_id)
        await self._kill(engine, None)

    def flip(self, engine_id: str, role: Role) -> None:
        """Give a running engine another role."""
        self._factory.flip(self.engines[engine_id], role)
        self._publish()

    def connect(self, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]) -> Connection:
        """dispatch.sessions.Connect."""
        engine = self._factory.incarnations[endpoint.engine_id, endpoint.epoch]
        return SimConnection(engine, ledger, self._factory.times, self._clock, on_change)

    async def carry_out(self, fault: Fault) -> None:
        """Wait for the fault's time, then for its end. A missing or dead engine is left as it is."""
        await self._clock.sleep(fault.at)
        engine = self.engines.get(fault.engine_id)
        if engine is None:
            return
        if fault.kind is FaultKind.KILL:
            await self._kill(engine, fault.lasts)
        else:
            await self._freeze(engine, fault.lasts)

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for engine in self.engines.values():
            engine.node.die()
            await shut_down(engine)

    async def _freeze(self, engine: SimEngine, lasts: float | None) -> None:
        fence = self._factory.times.fence
        engine.node.freeze()
        if lasts is not None and lasts < fence:
            await self._clock.sleep(lasts)
            engine.node.thaw()
            return
        await self._clock.sleep(fence)
        await self._kill(engine, self._factory.times.restart_backoff)

    async def _kill(self, engine: SimEngine, restart_after: float | None) -> None:
        if not engine.node.alive:
            return
        engine.node.die()
        self.engines.pop(engine.endpoint.engine_id)
        self._publish()
        await shut_down(engine)
        if restart_after is not None:
            await self._clock.sleep(restart_after)
            await self.start(engine.endpoint.engine_id, engine.endpoint.role)

    async def _watch(self, engine: SimEngine) -> None:
        self.failures.append(await engine.engine.death())

    def _publish(self) -> None:
        self._on_change(tuple(self._endpoint(engine) for engine in self.engines.values()))

    def _endpoint(self, engine: SimEngine) -> Endpoint:
        endpoint = engine.engine.endpoint
        draining = endpoint.engine_id in self._draining
        return replace(endpoint, state=EngineState.DRAINING) if draining else endpoint
