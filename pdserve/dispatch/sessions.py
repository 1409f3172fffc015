"""All engines a gateway talks to, and the load it has booked on them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.cluster import ClusterState, EngineView, Reservation, Route
from pdserve.core.endpoint import Endpoint, EngineState
from pdserve.core.errors import EngineDied
from pdserve.core.protocols import EngineClient
from pdserve.core.request import Request
from pdserve.dispatch.connection import EngineConnection


class Connection(EngineClient, Protocol):
    """An EngineClient with a life: gRPC (connection) or simulated."""

    @property
    def usable(self) -> bool:
        """Whether the engine has been heard from recently enough to get new work."""
        ...

    async def close(self) -> None:
        """Fail whatever still streams."""
        ...


Connect = Callable[[Endpoint, Callable[[], None]], Connection]
"""Opens a connection. The callback is to be called when the engine becomes usable and when it is lost."""


class SessionPool:
    """One connection per live engine incarnation, following the registry's endpoint set."""

    def __init__(self, times: Times, clock: Clock, connect: Connect | None = None) -> None:
        """connect: gRPC by default."""
        self._clock = clock
        self._connect = connect or partial(_connect, times, clock)
        self._endpoints: tuple[Endpoint, ...] = ()
        self._connections: dict[tuple[str, int], Connection] = {}
        self._reservations: dict[str, Reservation] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def changed(self) -> asyncio.Event:
        """Set as soon as an engine joins, becomes usable or is lost after this call."""
        return self._changed

    def update(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Connect to new incarnations, drop those that are gone; their requests fail with EngineDied."""
        self._endpoints = endpoints
        live = {(e.engine_id, e.epoch): e for e in endpoints if e.state not in (EngineState.STARTING, EngineState.DEAD)}
        for key in [key for key in self._connections if key not in live]:
            task = asyncio.get_running_loop().create_task(self._connections.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for key, endpoint in live.items():
            if key not in self._connections:
                self._connections[key] = self._connect(endpoint, self._note_change)
        self._note_change()

    def state(self) -> ClusterState:
        """What routing decides on: registry, heartbeats and own bookings together."""
        requests: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for reservation in self._reservations.values():
            requests[reservation.decode] += 1
            tokens[reservation.prefill] += reservation.prompt_tokens
        return ClusterState(
            now=self._clock.monotonic(),
            engines=tuple(self._view(endpoint, requests, tokens) for endpoint in self._endpoints),
        )

    def client(self, endpoint: Endpoint) -> EngineClient:
        """Raises EngineDied if this incarnation has left meanwhile."""
        connection = self._connections.get((endpoint.engine_id, endpoint.epoch))
        if connection is None:
            raise EngineDied(f"{endpoint.engine_id} has left the cluster")
        return connection

    @contextmanager
    def book(self, request: Request, route: Route) -> Iterator[None]:
        """Count the request's load on its engines until it ends."""
        self._reservations[request.id] = Reservation(
            request_id=request.id,
            prefill=route.prefill.engine_id,
            decode=route.decode.engine_id,
            prompt_tokens=len(request.prompt_token_ids),
            horizon_tokens=request.sampling.max_tokens,
        )
        try:
            yield
        finally:
            del self._reservations[request.id]

    async def close(self) -> None:
        self.update(())
        await asyncio.gather(*self._closing)

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _view(self, endpoint: Endpoint, requests: Counter[str], tokens: Counter[str]) -> EngineView:
        connection = self._connections.get((endpoint.engine_id, endpoint.epoch))
        if endpoint.state is EngineState.READY and not (connection and connection.usable):
            endpoint = replace(endpoint, state=EngineState.SUSPECT)
        return EngineView(
            endpoint=endpoint,
            load=connection.snapshot() if connection else None,
            booked_requests=requests[endpoint.engine_id],
            booked_tokens=tokens[endpoint.engine_id],
        )


def _connect(times: Times, clock: Clock, endpoint: Endpoint, on_change: Callable[[], None]) -> Connection:
    return EngineConnection(endpoint, times, clock, on_change)
