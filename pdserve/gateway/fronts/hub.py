"""The gateway's end: runs what its fronts ask for, and knows what they have in common."""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

from pdserve.dispatch.sessions import SessionPool
from pdserve.gateway.fronts.messages import State, Taken
from pdserve.gateway.fronts.session import FrontSession
from pdserve.gateway.gateway import Gateway
from pdserve.router.router import Router
from pdserve.telemetry.totals import Samples, Series

_LOOK_AGAIN = 1.0
"""Seconds after which the gateway's state is looked at though no engine has changed."""
_COUNT_TIMEOUT = 1.0
"""A front that has not told its metrics by then counts with what it told before."""


class FrontHub:
    """Listens for fronts on a Unix socket; whoever may open it may run requests in any tenant's name.

    A front that is gone has its requests cancelled and its claims released; what it counted stays counted.
    """

    def __init__(self, gateway: Gateway, routes: Router, sessions: SessionPool) -> None:
        self.gateway = gateway
        self.routes = routes
        self.claims = gateway.claims
        self._sessions = sessions
        self._fronts: set[FrontSession] = set()
        self._counted: dict[Series, float] = defaultdict(float)
        self._server: asyncio.Server | None = None
        self._loose: set[asyncio.Task[None]] = set()
        self._state = self._look()
        self.claims.on_taken = self._on_taken
        gateway.count_elsewhere = self.count

    @property
    def num_fronts(self) -> int:
        """Those whose line is up."""
        return len(self._fronts)

    async def listen(self, path: str) -> None:
        """Accept fronts from now on. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept, path)

    async def run(self) -> None:
        """Keep fronts informed of how the gateway stands."""
        while True:
            changed = self._sessions.changed()
            self.tell_state()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN):
                    await changed.wait()

    async def close(self) -> None:
        """Hang up; what still runs for fronts is cancelled."""
        if self._server is not None:
            self._server.close()
        fronts = list(self._fronts)
        for front in fronts:
            front.line.close()
        await asyncio.gather(*(front.line.closed for front in fronts), *self._loose)

    def tell_state(self) -> None:
        """Fronts hear of what has changed in how the gateway stands."""
        state = self._look()
        if state != self._state:
            self._state = state
            for front in self._fronts:
                front.line.say(state)

    async def count(self) -> Mapping[Series, float]:
        """What all fronts have counted since this gateway began, those that are gone included."""
        if asked := [front.counted() for front in self._fronts]:
            await asyncio.wait(asked, timeout=_COUNT_TIMEOUT)
        return self._counted

    def add(self, grown: Samples) -> None:
        """What a front has counted since it last told."""
        for series, more in grown:
            self._counted[series] += more

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that outlasts the front it is for."""
        task = asyncio.get_running_loop().create_task(work)
        self._loose.add(task)
        task.add_done_callback(self._loose.discard)

    def _accept(self) -> asyncio.Protocol:
        front = FrontSession(self, self._fronts.discard)
        self._fronts.add(front)
        front.line.say(self._state)
        return front.line

    def _on_taken(self, name: str, owner: str) -> None:
        for front in self._fronts:
            front.line.say(Taken(name, owner))

    def _look(self) -> State:
        return State(self.gateway.ready, tuple(self.gateway.degraded()), self.routes.namings)
