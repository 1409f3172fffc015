"""A whole cluster in one process: real model, scheduler, gRPC and transfer service over loopback memory."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from os import getpid
from pathlib import Path

from pdserve.config.times import Times
from pdserve.core.clock import Clock, SystemClock
from pdserve.core.cluster import ClusterState, Mode, Route, RouteAsk
from pdserve.core.endpoint import Endpoint, EngineLimits, EngineState, Role, new_epoch
from pdserve.core.errors import Unavailable
from pdserve.core.layout import KVLayout, KVOrder
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.dispatch.dispatcher import Dispatcher
from pdserve.dispatch.migration import MigrationRules
from pdserve.dispatch.replay import ReplayRules
from pdserve.dispatch.sessions import SessionPool
from pdserve.engine.engine import Engine
from pdserve.engine.pair_checker import PairChecker
from pdserve.engine.server import EngineServer, grpc_links
from pdserve.router.admission import AdmissionRules
from pdserve.router.loading import load_policy
from pdserve.router.options import ready_engines
from pdserve.router.policy import RoutingPolicy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from pdserve.telemetry.record import RequestRecord
from pdserve.tiers.service import LocalTierService
from pdserve.tiers.spec import TierSpec
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from pdserve.worker.worker import Worker, WorkerOptions, build_worker

_IDS = count()
EVERYBODY = AdmissionRules(enabled=False)
"""Tests of engines and handoffs want them overrun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One engine of a test cluster."""

    role: Role
    limits: EngineLimits = field(default_factory=EngineLimits)
    num_blocks: int = 64
    block_size: int = 16
    order: KVOrder = KVOrder.BLOCK_MAJOR
    backend: TransferBackend = field(default_factory=LoopbackBackend)
    tiers: TierSpec | None = None
    domain: str = ""


class PairsOnly:
    """A policy for tests of handoffs: prefill here, decode there, or not at all."""

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        [prefill, *_], [decode, *_] = (
            ready_engines(ask, state, role) or (None,) for role in (Role.PREFILL, Role.DECODE)
        )
        if prefill is None or decode is None:
            raise Unavailable("one of the pools is empty")
        return Route(mode=Mode.DISAGGREGATED, prefill=prefill.endpoint, decode=decode.endpoint, reason="a test's wish")


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything a client could see of one answer, and how it came about."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    record: RequestRecord


@dataclass(slots=True)
class Cluster:
    """Engines behind one dispatcher."""

    engines: dict[str, Engine]
    sessions: SessionPool
    dispatcher: Dispatcher
    clock: Clock

    async def answer(
        self, prompt: Iterable[int], sampling: SamplingParams, *, salt: bytes = b"", timeout: float = 60.0
    ) -> Answer:
        request = Request(
            id=f"r{next(_IDS)}", prompt_token_ids=tuple(prompt), sampling=sampling, salt=salt, timeout=timeout
        )
        record = RequestRecord(request_id=request.id)
        tokens: list[int] = []
        logprobs: list[float] = []
        reason = None
        async for delta in self.dispatcher.generate(request, record):
            tokens += delta.token_ids
            logprobs += delta.logprobs or ()
            reason = delta.finish_reason
        return Answer(tuple(tokens), tuple(logprobs), reason, record)

    async def until_idle(self, deadline: float = 5.0) -> None:
        """Wait until every block of every engine is free again. Raises TimeoutError with the states."""
        async with asyncio.timeout(deadline):
            while any(e.snapshot().blocks.free != e.snapshot().blocks.total for e in self.engines.values()):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def open_cluster(
    checkpoint: Path,
    specs: dict[str, NodeSpec],
    *,
    times: Times | None = None,
    clock: Clock | None = None,
    decode_local_below: int = 0,
    policy: str | RoutingPolicy = "kv_aware",
    replay: ReplayRules | None = None,
    rules: RoutingRules | None = None,
    migration: MigrationRules | None = None,
    admission: AdmissionRules = EVERYBODY,
) -> AsyncIterator[Cluster]:
    """Start the named engines and wait until the dispatcher can use all of them."""
    times, clock = times or Times(), clock or SystemClock()
    async with AsyncExitStack() as stack:
        engines = {
            name: await _open_engine(stack, checkpoint, name, spec, times, clock) for name, spec in specs.items()
        }
        sessions = SessionPool(times, clock)
        stack.push_async_callback(sessions.close)
        sessions.update(tuple(engine.endpoint for engine in engines.values()))
        rules = rules or RoutingRules(decode_local_below=decode_local_below)
        chosen = load_policy(policy, rules) if isinstance(policy, str) else policy
        dispatcher = Dispatcher(sessions, Router(chosen, sessions.index, rules), clock, replay, migration, admission)
        async with asyncio.timeout(10):
            while any(view.endpoint.state is not EngineState.READY for view in dispatcher.engines()):
                await asyncio.sleep(0.005)
        yield Cluster(engines, sessions, dispatcher, clock)


async def _open_engine(
    stack: AsyncExitStack, checkpoint: Path, name: str, spec: NodeSpec, times: Times, clock: Clock
) -> Engine:
    epoch = new_epoch()
    worker, memory = _build_worker(checkpoint, spec)
    stack.callback(worker.close)
    transfer = await LocalTransferService.open(
        engine_id=name, epoch=epoch, layout=worker.layout, memory=memory, backends=(spec.backend,), clock=clock
    )
    stack.push_async_callback(transfer.close)
    tiers = await _open_tiers(stack, name, spec, worker.layout, memory)
    server = EngineServer("127.0.0.1")
    endpoint = Endpoint(
        engine_id=name,
        role=spec.role,
        epoch=epoch,
        address=server.address,
        pid=getpid(),
        state=EngineState.READY,
    )
    engine = Engine(
        endpoint=endpoint,
        info=worker.info,
        limits=spec.limits,
        executor=worker.executor,
        transfer=transfer,
        open_link=grpc_links(transfer, times, clock),
        times=times,
        clock=clock,
        tiers=tiers,
        domain=spec.domain,
    )
    await stack.enter_async_context(engine)
    checker = PairChecker(engine, transfer, times)
    stack.push_async_callback(checker.close)
    await server.start(engine, times, checker)
    stack.push_async_callback(server.stop, 0.0)
    return engine


async def _open_tiers(
    stack: AsyncExitStack, name: str, spec: NodeSpec, layout: KVLayout, memory: HostMemory
) -> LocalTierService | None:
    if spec.tiers is None:
        return None
    tiers = await LocalTierService.open(spec.tiers, name=name, layout=layout, memory=memory, computed_by="test")
    stack.push_async_callback(tiers.close)
    return tiers


def _build_worker(checkpoint: Path, spec: NodeSpec) -> tuple[Worker, HostMemory]:
    memories: list[HostMemory] = []

    def allocate(nbytes: int) -> memoryview:
        memories.append(HostMemory(nbytes))
        return memories[0].array.data

    options = WorkerOptions(num_blocks=spec.num_blocks, block_size=spec.block_size, order=spec.order)
    return build_worker(checkpoint, options, allocate=allocate), memories[0]
