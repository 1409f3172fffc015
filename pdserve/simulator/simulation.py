"""Runs a workload on a simulated cluster: real engines' scheduling, router and dispatch, in virtual time."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from pdserve.config.times import Times
from pdserve.core.admission import TenantRules
from pdserve.core.clock import Clock
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import ConfigError, PdserveError
from pdserve.core.layout import KVLayout
from pdserve.dispatch.dispatcher import Dispatcher
from pdserve.dispatch.replay import ReplayRules
from pdserve.dispatch.sessions import SessionPool
from pdserve.router.admission import AdmissionRules
from pdserve.router.loading import load_policy
from pdserve.router.policy import RoutingPolicy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from pdserve.scaler.runner import Scaler
from pdserve.simulator.cluster import Fault, SimCluster
from pdserve.simulator.engines import EngineFactory, SimEngine
from pdserve.simulator.profile import Profile
from pdserve.simulator.report import (
    EngineUse,
    SimulatedRequest,
    SimulationReport,
    hit_share,
    imbalance_of,
    uncached_by_engine,
)
from pdserve.simulator.scaling import ScalingSpec, SimCloud
from pdserve.simulator.virtual_time import VirtualClock, run_virtual
from pdserve.simulator.workload import Arrival
from pdserve.telemetry.record import RequestRecord
from pdserve_loadgen.report import Outcome, RequestResult, Slo, build_report

_ALL_DECISIONS = 100_000
_IDLE_DEADLINE = 60.0
"""Virtual seconds engines get after the last request to let go of its blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSpec:
    """The simulated deployment. engines: how many of each role. kv_tokens: of each engine; the profile's when None.

    depth: steps in flight. policy: as routing.policy in the configuration, or what builds one. admission: off unless
    given, so that policies are compared by the same requests. scaling: engines come and go, those of `engines` are
    there at the start. Everything random follows from seed.
    """

    profile: Profile
    engines: Mapping[Role, int]
    block_size: int = 16
    kv_tokens: int | None = None
    depth: int = 2
    seed: int = 0
    policy: str | Callable[[RoutingRules], RoutingPolicy] = "kv_aware"
    times: Times = field(default_factory=Times)
    rules: RoutingRules = field(default_factory=RoutingRules)
    replay: ReplayRules = field(default_factory=ReplayRules)
    admission: AdmissionRules = field(default_factory=lambda: AdmissionRules(enabled=False))
    tenants: Mapping[str, TenantRules] = field(default_factory=dict)
    scaling: ScalingSpec | None = None

    @property
    def layout(self) -> KVLayout:
        """Raises ConfigError if the engines could hold no block."""
        num_blocks = (self.kv_tokens or self.profile.kv_tokens) // self.block_size
        if num_blocks < 1:
            raise ConfigError(f"KV for fewer than {self.block_size} tokens is not one block: give the engines more")
        return KVLayout(group=self.profile.kv.group(), block_size=self.block_size, num_blocks=num_blocks)


class Simulation:
    """May run any number of workloads, each on a fresh cluster."""

    def __init__(self, spec: SimulationSpec) -> None:
        self.spec = spec

    def run(
        self, workload: Iterable[Arrival], *, faults: Sequence[Fault] = (), slo: Slo | None = None, title: str = ""
    ) -> SimulationReport:
        """Serve the whole workload, given in order of arrival; the same input gives the same report.

        Raises RuntimeError when an engine ended that nobody ended."""

        async def serve() -> SimulationReport:
            return await _Run(self.spec).serve(workload, faults, slo, title)

        return run_virtual(serve())


class _Run:
    """One run, on the running VirtualTimeLoop."""

    def __init__(self, spec: SimulationSpec) -> None:
        self._spec = spec
        self._clock: Clock = VirtualClock(asyncio.get_running_loop())
        self._factory = EngineFactory(spec.profile, spec.layout, spec.times, self._clock, spec.depth)
        self._sessions = SessionPool(spec.times, self._clock, lambda *args: self._cluster.connect(*args))
        self._cluster = SimCluster(self._factory, Random(spec.seed), self._clock, self._sessions.update)
        policy = load_policy(spec.policy, spec.rules) if isinstance(spec.policy, str) else spec.policy(spec.rules)
        router = Router(policy, self._sessions.index, spec.rules)
        self._dispatcher = Dispatcher(
            self._sessions, router, self._clock, spec.replay, admission=spec.admission, tenants=spec.tenants
        )
        self._origin = 0.0
        warm_up = spec.scaling.warm_up if spec.scaling else 0.0
        self._cloud = SimCloud(self._cluster, self._clock, warm_up, self._now)

    async def serve(
        self, workload: Iterable[Arrival], faults: Sequence[Fault], slo: Slo | None, title: str
    ) -> SimulationReport:
        await self._cloud.begin(self._spec.engines)
        try:
            await self._until_ready()
            self._origin = self._clock.monotonic()
            self._cloud.count_from_now()
            scaling = asyncio.create_task(self._scale(self._spec.scaling)) if self._spec.scaling else None
            served, ended = await self._serve_all(workload, faults)
            if scaling:
                await _end(scaling)
            await self._cloud.close()
            await self._until_idle()
            if self._cluster.failures:
                raise RuntimeError(f"engines ended by themselves: {'; '.join(map(str, self._cluster.failures))}")
            return self._report(served, ended, slo, title)
        finally:
            await self._sessions.close()
            await self._cluster.close()

    async def _until_ready(self) -> None:
        while True:
            changed = self._sessions.changed()
            if all(view.endpoint.state is EngineState.READY for view in self._sessions.state().engines):
                return
            await changed.wait()

    async def _serve_all(
        self, workload: Iterable[Arrival], faults: Sequence[Fault]
    ) -> tuple[list[SimulatedRequest], float]:
        """Every request, and when the last one had ended; returns when the faults are over, too."""
        loop = asyncio.get_running_loop()
        troubles = [loop.create_task(self._cluster.carry_out(fault)) for fault in faults]
        requests: list[asyncio.Task[SimulatedRequest]] = []
        for arrival in workload:
            await self._clock.sleep(max(0.0, self._origin + arrival.at - self._clock.monotonic()))
            requests.append(loop.create_task(self._serve(arrival)))
        self._cloud.stop_counting()
        served = await asyncio.gather(*requests)
        ended = self._now()
        await asyncio.gather(*troubles)
        return served, ended

    async def _serve(self, arrival: Arrival) -> SimulatedRequest:
        request = arrival.request
        record = RequestRecord(request_id=request.id)
        sent = self._now()
        tokens: list[int] = []
        times: list[float] = []
        failure: PdserveError | None = None
        await self._clock.sleep(self._spec.profile.gateway)
        try:
            async for delta in self._dispatcher.generate(request, record):
                tokens += delta.token_ids
                times += [self._now()] * bool(delta.token_ids)
        except PdserveError as error:
            failure = error
        result = RequestResult(
            id=request.id,
            scheduled=arrival.at,
            sent=sent,
            finished=self._now(),
            outcome=Outcome.ERROR if failure else Outcome.OK,
            token_times=times,
            input_tokens=len(request.prompt_token_ids),
            output_tokens=len(tokens),
            error=failure.code if failure else None,
            request_id=request.id,
        )
        return SimulatedRequest(result=result, token_ids=tuple(tokens), record=record)

    async def _scale(self, spec: ScalingSpec) -> None:
        scaler = Scaler(spec.policy, self._cloud, self._clock, keep=_ALL_DECISIONS, decide=spec.decide)
        self._cloud.report.failures = scaler.failures
        while True:
            await self._clock.sleep(spec.policy.interval)
            self._dispatcher.obey(await scaler.step(self._dispatcher.demand()))
            self._cloud.report.decisions = list(scaler.decisions)

    async def _until_idle(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_DEADLINE):
                while any(_held(engine) for engine in self._cluster.engines.values()):
                    await self._clock.sleep(self._spec.times.heartbeat)

    def _report(self, served: list[SimulatedRequest], ended: float, slo: Slo | None, title: str) -> SimulationReport:
        complete = [request for request in served if request.result.outcome is Outcome.OK]
        uncached = uncached_by_engine(complete)
        engines = tuple(self._use(engine, ended, uncached[key]) for key, engine in self._factory.incarnations.items())
        profile = self._spec.profile
        load = build_report(
            [request.result for request in served],
            title=title or f"simulated {profile.name}",
            slo=slo,
            notes=(f"simulated in virtual time; {profile.name}: {profile.basis}",),
            settings=self._settings(),
        )
        return SimulationReport(
            load=load,
            requests=tuple(served),
            engines=engines,
            prefix_hit_share=hit_share(complete),
            imbalance=imbalance_of(engines),
            replays=sum(len(request.record.failed) for request in served),
            scaling=self._cloud.report,
        )

    def _use(self, engine: SimEngine, ended: float, uncached_tokens: int) -> EngineUse:
        work = engine.executor.work
        return EngineUse(
            engine_id=engine.endpoint.engine_id,
            role=engine.endpoint.role,
            alive=engine.node.alive,
            steps=work.steps,
            tokens=work.tokens,
            utilisation=work.busy_seconds / ended if ended else 0.0,
            uncached_tokens=uncached_tokens,
            blocks=engine.engine.snapshot().blocks,
        )

    def _settings(self) -> dict[str, object]:
        spec = self._spec
        return {
            "profile": spec.profile.model_dump(mode="json"),
            "engines": {role.value: count for role, count in spec.engines.items()},
            "block_size": spec.block_size,
            "kv_tokens": spec.kv_tokens or spec.profile.kv_tokens,
            "depth": spec.depth,
            "seed": spec.seed,
            "policy": spec.policy if isinstance(spec.policy, str) else "custom",
        }

    def _now(self) -> float:
        return self._clock.monotonic() - self._origin


async def _end(task: "asyncio.Task[None]") -> None:
    """Cancel it. Raises what it has failed with."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _held(engine: SimEngine) -> bool:
    blocks = engine.engine.snapshot().blocks
    return blocks.free != blocks.total
