"""All engines a gateway talks to, and the load it has booked on them."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import structlog

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.cluster import (
    ClusterState,
    EngineKey,
    EngineView,
    Link,
    Route,
    StepModel,
)
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import DigestMismatch, EngineDied, LinkLost, TransferFailed, TransferTimeout
from pdserve.core.protocols import EngineClient
from pdserve.core.request import EngineTrace, PrefixFetch, Request
from pdserve.dispatch.booking import Booking
from pdserve.dispatch.connection import EngineConnection
from pdserve.dispatch.fetch_speeds import FetchSpeeds
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.links import LostLinks
from pdserve.dispatch.pacing import Pacer
from pdserve.dispatch.pair_watch import LEAST_BYTES, PairWatch
from pdserve.dispatch.views import Views
from pdserve.router.kv_index import KVIndex
from pdserve.router.pool_model import PoolModel

_log = structlog.get_logger(__name__)


_LINK_ERRORS = (LinkLost.code, TransferFailed.code, TransferTimeout.code)
"""What an engine reports when nothing came over a link."""
_NO_LINKS: frozenset[EngineKey] = frozenset()


class Connection(EngineClient, Protocol):
    """An EngineClient with a life: gRPC (connection) or simulated."""

    @property
    def usable(self) -> bool:
        """Whether the engine has been heard from recently enough to get new work; on_change is called when it
        changes."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it broke; it does not mend."""
        ...

    async def close(self) -> None:
        """Fail whatever still streams."""
        ...


Connect = Callable[[Endpoint, EngineLedger, Callable[[], None]], Connection]
"""Opens a connection, which tells the ledger what the engine reports of itself. The callback is to be called when
the engine becomes usable, when it begins to drain and when it is lost."""


class SessionPool:
    """One connection per live engine incarnation, following the registry's endpoint set."""

    def __init__(
        self, times: Times, clock: Clock, connect: Connect | None = None, index: KVIndex | None = None
    ) -> None:
        """connect: gRPC by default. index follows the engines' KV events; the router reads it."""
        self.index = index or KVIndex()
        self._clock = clock
        self._retry = times.heartbeat
        self._connect = connect or partial(_connect, times, clock, Pacer())
        self._endpoints: tuple[Endpoint, ...] = ()
        self._connections: dict[EngineKey, Connection] = {}
        self._ledgers: dict[EngineKey, EngineLedger] = {}
        self._pools = {role: PoolModel[EngineKey]() for role in Role}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.bypass_below = 0
        """As in ClusterState."""
        self.draining: frozenset[EngineKey] = frozenset()
        """Engines that let what decodes there go elsewhere."""
        self.on_draining: list[Callable[[], None]] = []
        """Called when an engine begins to drain."""
        self._roles: dict[EngineKey, Role] = {}
        self._vacated: set[EngineKey] = set()
        """Engines that were there to decode and are no longer."""
        self.on_load: list[Callable[[], None]] = []
        """Called when an engine has told its load."""
        self.on_booked: list[Callable[[EngineKey, str], None]] = []
        """Called when the booking of a request (its id) on an engine has changed."""
        self._links = LostLinks(times, clock)
        self._watch = PairWatch()
        self._speeds = FetchSpeeds(clock)
        self._handoff_speeds = FetchSpeeds(clock)
        self._views = Views(self._view)
        self._versions: list[int] = []
        """Of the pools' models, when views were looked at last."""
        self._lost: dict[EngineKey, frozenset[EngineKey]] = {}
        """Links that were avoided then."""
        self._bad_link_backoff = times.link_backoff_max
        self._mixture: frozenset[str] = frozenset()
        """Of numerics, as told last."""

    def changed(self) -> asyncio.Event:
        """Set as soon as an engine joins, becomes usable or is lost, or a lost link works, after this call."""
        return self._changed

    def update(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Connect to new incarnations, drop those that are gone; their requests fail with EngineDied."""
        self._endpoints = endpoints
        live = {(e.engine_id, e.epoch): e for e in endpoints if e.state not in (EngineState.STARTING, EngineState.DEAD)}
        self._roles = {key: role for key, role in self._roles.items() if key in live}
        self._vacated &= live.keys()
        for key in [key for key in self._connections if key not in live]:
            self._ledgers.pop(key).forget()
            self._keep(asyncio.get_running_loop().create_task(self._connections.pop(key).close()))
        for key, endpoint in live.items():
            self._note_role(key, endpoint)
            if key not in self._connections:
                self._ledgers[key] = EngineLedger(
                    key,
                    self.index,
                    self._clock,
                    self._pools[endpoint.role],
                    self._prior(endpoint),
                    self._filled(endpoint),
                    on_load=self._note_load,
                    on_change=partial(self._views.outdate, (key,)),
                    on_booked=partial(self._note_booked, key),
                )
                self._open(key, endpoint)
        self._links.keep(live)
        self._watch.keep(live)
        self._speeds.keep(live)
        self._handoff_speeds.keep(live)
        self._views.follow(endpoints)
        self._note_change()

    def state(self) -> ClusterState:
        """What routing decides on: registry, heartbeats and own bookings together. Engines of which nothing has changed
        since the last state are the same objects."""
        now = self._clock.monotonic()
        versions = [pool.version for pool in self._pools.values()]
        if versions != self._versions:
            self._versions = versions
            self._views.outdate_all()
        lost = self._links.avoided()
        if lost != self._lost:
            self._views.outdate(key for key in lost.keys() | self._lost.keys() if lost.get(key) != self._lost.get(key))
            self._lost = lost
        return ClusterState(now=now, engines=self._views.at(now), bypass_below=self.bypass_below)

    @property
    def ledgers(self) -> Mapping[EngineKey, EngineLedger]:
        """Of the engines that are connected to."""
        return self._ledgers

    def client(self, endpoint: Endpoint) -> Connection:
        """Raises EngineDied if this incarnation has left meanwhile."""
        connection = self._connections.get((endpoint.engine_id, endpoint.epoch))
        if connection is None:
            raise EngineDied(f"{endpoint.engine_id} has left the cluster")
        return connection

    @contextmanager
    def book(self, request: Request, route: Route) -> Iterator[Booking]:
        """Count the request's load on its engines until it ends; its prompt, until its first token."""
        booking = Booking(self._ledgers, request, route, self._links)
        try:
            yield booking
        finally:
            booking.release()

    def link_lost(self, link: Link) -> None:
        """A handoff failed because of its link: others avoid it for a while."""
        if self._links.lost(link):
            _log.warning("link lost, handoffs avoid it", **_named(link))

    def link_works(self, link: Link) -> None:
        """A handoff's KV was fetched."""
        if self._links.works(link):
            _log.info("link works again", **_named(link))
            self._note_change()

    def prefix_fetched(self, link: Link, fetch: PrefixFetch) -> None:
        """How fetching a prompt's beginning over a link went."""
        if not fetch.error:
            self._speeds.fetched(link, fetch.tokens, fetch.seconds - fetch.restore_seconds)
            self._views.outdate(link)
            self.link_works(link)
        elif fetch.error in _LINK_ERRORS:
            self.link_lost(link)
        elif fetch.error == DigestMismatch.code:
            self.link_damaged(link)

    def link_carried(self, link: Link, trace: EngineTrace, tokens: int) -> None:
        """A handoff's transfer, of KV for so many tokens, as its decode engine tells it. A link that is slow again and
        again is avoided."""
        stages = dict(trace.transfer_stages)
        seconds = stages.get("post", 0.0) + stages.get("wire", 0.0)
        far = self._leaves_domain(link)
        if far and trace.transfer_bytes >= LEAST_BYTES:
            self._handoff_speeds.carried(link, tokens, seconds)
            self._views.outdate(link)
        slow = self._watch.carried(link, trace.transfer_bytes, seconds, far=far)
        if slow and self._links.lost(link, self._bad_link_backoff):
            _log.warning("link slow, handoffs avoid it", bytes=trace.transfer_bytes, seconds=seconds, **_named(link))

    def link_damaged(self, link: Link) -> None:
        """A handoff's bytes arrived damaged."""
        if self._watch.damaged(link) and self._links.lost(link, self._bad_link_backoff):
            _log.warning("link damages KV, handoffs avoid it", **_named(link))

    def next_link_try(self) -> float | None:
        """When (monotonic) a link that is avoided now may be tried; None when none is."""
        return self._links.next_try()

    async def close(self) -> None:
        self.update(())
        while self._closing:
            await asyncio.wait(self._closing, timeout=self._retry)
            for task in self._closing:
                task.cancel()

    @property
    def opening(self) -> bool:
        """Whether an engine said to be ready has not been heard from yet."""
        return any(
            endpoint.state is EngineState.READY and not (connection.usable or connection.failed)
            for endpoint in self._endpoints
            if (connection := self._connections.get((endpoint.engine_id, endpoint.epoch)))
        )

    def _note_role(self, key: EngineKey, endpoint: Endpoint) -> None:
        """An engine may have taken another role: its peers are others, and what decodes there may go elsewhere."""
        before, self._roles[key] = self._roles.get(key, endpoint.role), endpoint.role
        if before is endpoint.role:
            return
        self._ledgers[key].join(self._pools[endpoint.role])
        if endpoint.role is Role.PREFILL:
            self._vacated.add(key)
        else:
            self._vacated.discard(key)

    def _open(self, key: EngineKey, endpoint: Endpoint) -> None:
        reopening = False

        def on_change() -> None:
            nonlocal reopening
            self._note_change()
            connection = self._connections.get(key)
            if connection is not None and connection.failed and not reopening:
                reopening = True
                self._keep(asyncio.get_running_loop().create_task(self._reopen(key, endpoint, connection)))

        self._connections[key] = self._connect(endpoint, self._ledgers[key], on_change)

    async def _reopen(self, key: EngineKey, endpoint: Endpoint, broken: Connection) -> None:
        """An engine the registry still lists may be well, and only the session to it broken."""
        await broken.close()
        await self._clock.sleep(self._retry)
        if self._connections.get(key) is broken:
            self._open(key, endpoint)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _note_change(self) -> None:
        self._views.outdate_all()
        before, self.draining = self.draining, self._find_draining()
        if self.draining - before:
            for told in self.on_draining:
                told()
        self._note_numerics()
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_numerics(self) -> None:
        """Say once of a mixture that it is there."""
        engines = {key[0]: ledger.numerics for key, ledger in self._ledgers.items() if ledger.numerics}
        mixture = frozenset(engines.values())
        if len(mixture) > 1 and mixture != self._mixture:
            self._mixture = mixture
            _log.error("engines round differently, equal requests may get different answers", engines=engines)

    def _leaves_domain(self, link: Link) -> bool:
        """Within a domain, as without any, links are not told apart."""
        domains = {ledger.domain for end in link if (ledger := self._ledgers.get(end))}
        return len(domains) > 1 and "" not in domains

    def _note_load(self) -> None:
        for told in self.on_load:
            told()

    def _note_booked(self, key: EngineKey, request_id: str) -> None:
        for told in self.on_booked:
            told(key, request_id)

    def _find_draining(self) -> frozenset[EngineKey]:
        """By the registry or by their own word, and those that are no longer there to decode."""
        loads = {key: connection.snapshot() for key, connection in self._connections.items()}
        told = {key for key, load in loads.items() if load and load.draining}
        listed = {(e.engine_id, e.epoch) for e in self._endpoints if e.state is EngineState.DRAINING}
        return frozenset(told | (listed | self._vacated) & loads.keys())

    def _view(self, endpoint: Endpoint, now: float) -> EngineView:
        key = endpoint.engine_id, endpoint.epoch
        ledger = self._ledgers.get(key)
        if ledger is None:
            return EngineView(endpoint=endpoint, load=None)
        return ledger.view(
            endpoint,
            now,
            usable=self._connections[key].usable,
            lost_links=self._lost.get(key, _NO_LINKS),
            fetch_speeds=self._speeds.to(key),
            handoff_speeds=self._handoff_speeds.to(key),
        )

    def _filled(self, newcomer: Endpoint) -> float:
        """How full its peers are. An engine that joins them is empty, and by what it would evict alone everything would
        be sent there until it is full as well."""
        peers = (self._ledgers.get((e.engine_id, e.epoch)) for e in self._endpoints if e.role is newcomer.role)
        filled = [ledger.kv_filled for ledger in peers if ledger]
        return sum(filled) / len(filled) if filled else 0.0

    def _prior(self, newcomer: Endpoint) -> StepModel | None:
        """What a peer of the same role has learned of its steps."""
        peers = (e for e in self._endpoints if e.role is newcomer.role)
        ledgers = (self._ledgers.get((peer.engine_id, peer.epoch)) for peer in peers)
        return next((ledger.step_model for ledger in ledgers if ledger and ledger.step_model), None)


def _named(link: Link) -> dict[str, str]:
    (source, _), (target, _) = link
    return {"source": source, "target": target}


def _connect(
    times: Times, clock: Clock, pacer: Pacer, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]
) -> Connection:
    return EngineConnection(endpoint, ledger, times, clock, on_change, pacer)
