"""Engines that somebody else starts, found by name: each address behind a DNS name or in a list is asked who is there.

An engine tells its name, role and epoch when a session begins, so that a name server need only know addresses.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

import grpc
import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineState
from pdserve.core.errors import LayoutMismatch, PdserveError
from pdserve.rpc import convert
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1.engine_pb2_grpc import EngineServiceStub

_RECONNECT = 0.2
"""Seconds before an address that did not answer is asked again."""

_log = structlog.get_logger(__name__)

_NOT_THERE = (socket.EAI_NONAME, socket.EAI_NODATA)
"""Answers of a name server: there is no such name, or no machine has it."""

Introductions = Callable[[str], AsyncGenerator[Endpoint, None]]
"""address → the engine there, once per sign of life; ends with the session. Raises PdserveError for what is none of
ours."""
Resolve = Callable[[str], Awaitable[tuple[str, ...]]]
"""host:port → an address for each machine of that name. Raises OSError when nobody can tell now."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """An engine and when (monotonic) it last gave a sign of life."""

    engine: Endpoint
    heard: float


def visible(sightings: Iterable[Sighting], now: float, times: Times) -> tuple[Endpoint, ...]:
    """The engines as gateways should see them, by name: suspect when silent, gone when that lasts. One that drains may
    well end: its silence is not suspect. An engine that was seen at two addresses has moved to where it was heard
    last."""
    latest: dict[str, Sighting] = {}
    for sighting in sorted(sightings, key=lambda sighting: sighting.heard):
        if now - sighting.heard < times.fence:
            latest[sighting.engine.engine_id] = sighting
    return tuple(_as_heard(latest[name], now, times) for name in sorted(latest))


def _as_heard(sighting: Sighting, now: float, times: Times) -> Endpoint:
    silent = now - sighting.heard >= times.suspect and sighting.engine.state is EngineState.READY
    return replace(sighting.engine, state=EngineState.SUSPECT) if silent else sighting.engine


class Discovery:
    """Follows the engines behind targets (host:port); on_change is told the endpoint set whenever it differs.

    An address is asked for as long as its name is resolved to it or an engine there gives signs of life: one that
    drains leaves its name before it ends.
    """

    def __init__(
        self,
        targets: tuple[str, ...],
        *,
        times: Times,
        clock: Clock,
        on_change: Callable[[tuple[Endpoint, ...]], None],
        introductions: Introductions,
        resolve: Resolve | None = None,
    ) -> None:
        self._targets = targets
        self._times = times
        self._clock = clock
        self._on_change = on_change
        self._resolve = resolve or addresses_of
        self._introductions = introductions
        self._resolved: dict[str, tuple[str, ...]] = {}
        self._unknown: set[str] = set()
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._sightings: dict[str, Sighting] = {}
        self._published: tuple[Endpoint, ...] = ()
        self._awake = clock.monotonic()

    async def run(self) -> None:
        """Look until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_resolving())
                while True:
                    self._notice_pause()
                    self._ask(group)
                    self._publish()
                    await self._clock.sleep(self._times.heartbeat)
        finally:
            self._asking.clear()

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.gather(*map(self._look_up, self._targets))
            await self._clock.sleep(self._times.heartbeat)

    async def _look_up(self, target: str) -> None:
        """What a name server does not know now, or cannot tell, it may have known before."""
        try:
            async with asyncio.timeout(self._times.suspect):
                self._resolved[target] = await self._resolve(target)
        except (OSError, TimeoutError) as error:
            if target not in self._unknown:
                _log.warning("cannot resolve, trying again", target=target, cause=str(error))
            self._unknown.add(target)
        else:
            self._unknown.discard(target)

    def _ask(self, group: asyncio.TaskGroup) -> None:
        now = self._clock.monotonic()
        named = {address for found in self._resolved.values() for address in found}
        for address in [address for address in self._asking if address not in named]:
            sighting = self._sightings.get(address)
            if sighting is None or now - sighting.heard >= self._times.fence:
                self._sightings.pop(address, None)
                self._asking.pop(address).cancel()
        for address in sorted(named - self._asking.keys()):
            self._asking[address] = group.create_task(self._follow(address))

    async def _follow(self, address: str) -> None:
        told = ""
        while True:
            try:
                async with aclosing(self._introductions(address)) as introductions:
                    async for engine in introductions:
                        self._saw(address, engine)
            except PdserveError as error:
                if str(error) != told:
                    told = str(error)
                    _log.error("not used", address=address, cause=told)
                await self._clock.sleep(self._times.heartbeat)
            await self._clock.sleep(_RECONNECT)

    def _saw(self, address: str, engine: Endpoint) -> None:
        self._notice_pause()
        before = self._sightings.get(address)
        if before is None or before.engine.epoch != engine.epoch:
            _log.info("found", engine=engine.engine_id, role=engine.role.value, address=address, pid=engine.pid)
        self._sightings[address] = Sighting(engine, self._clock.monotonic())
        self._publish()

    def _notice_pause(self) -> None:
        """While this process itself did not run (stopped, starved), nobody was silent."""
        now = self._clock.monotonic()
        pause, self._awake = now - self._awake, now
        if pause > 2 * self._times.heartbeat:
            self._sightings = {
                address: replace(sighting, heard=sighting.heard + pause)
                for address, sighting in self._sightings.items()
            }

    def _publish(self) -> None:
        endpoints = visible(self._sightings.values(), self._clock.monotonic(), self._times)
        if endpoints != self._published:
            _report(_by_name(self._published), _by_name(endpoints))
            self._published = endpoints
            self._on_change(endpoints)


async def introductions_at(address: str, *, revision: str) -> AsyncGenerator[Endpoint, None]:
    """Who is at an address, READY or DRAINING, once per message; ends when nobody is, or the session does. Raises
    LayoutMismatch for an engine of another model than this revision, MalformedMessage for something else than an
    engine."""
    channel = open_channel(address)
    engine: Endpoint | None = None
    try:
        with suppress(grpc.aio.AioRpcError):
            async for message in EngineServiceStub(channel).Session():
                for event in message.events:
                    if event.HasField("description"):
                        engine = convert.described_endpoint(event.description, address)
                        if event.description.model_revision != revision:
                            raise LayoutMismatch(f"{engine.engine_id} serves another model or revision of it")
                    elif engine is not None and event.HasField("load") and event.load.draining:
                        engine = replace(engine, state=EngineState.DRAINING)
                if engine is not None:
                    yield engine
    finally:
        await channel.close()


async def addresses_of(target: str) -> tuple[str, ...]:
    """The IPv4 addresses of host:port. Raises OSError when no name server answers."""
    host, _, port = target.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, int(port), family=socket.AF_INET, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NOT_THERE:
            return ()
        raise
    return tuple(sorted({f"{address[0]!s}:{port}" for *_, address in found}))


def _by_name(endpoints: tuple[Endpoint, ...]) -> Mapping[str, Endpoint]:
    return {endpoint.engine_id: endpoint for endpoint in endpoints}


def _report(before: Mapping[str, Endpoint], after: Mapping[str, Endpoint]) -> None:
    for name in before.keys() - after.keys():
        if before[name].state is EngineState.DRAINING:
            _log.info("left", engine=name, address=before[name].address)
        else:
            _log.warning("lost", engine=name, address=before[name].address)
    for name, endpoint in after.items():
        known = before.get(name)
        if known is None or known.state is endpoint.state:
            continue
        match endpoint.state:
            case EngineState.SUSPECT:
                _log.warning("silent", engine=name, address=endpoint.address)
            case EngineState.DRAINING:
                _log.info("drains", engine=name, address=endpoint.address)
            case _:
                _log.info("heard again", engine=name, address=endpoint.address)
