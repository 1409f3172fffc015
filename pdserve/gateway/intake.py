"""Which requests run, and whether more may come."""

import asyncio
import math
from typing import Protocol

from pdserve.core.errors import Cancelled, PdserveError, Unavailable
from pdserve.core.request import Request
from pdserve.gateway.auth import Identity

CLOSING = "the server is shutting down; another one will answer"


class Running(Protocol):
    """A request that runs and can be ended from elsewhere."""

    @property
    def request(self) -> Request: ...

    def abort(self, error: PdserveError) -> None:
        """error: what its client is told."""


class Intake:
    """The door. Leaving, it says that it will close, and lets in whoever comes nevertheless; draining, it lets nobody
    in, and drained() tells when the last one left."""

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._held: dict[str, float] = {}
        self._leaving = False
        self._last = -math.inf
        self.draining = False

    @property
    def leaving(self) -> bool:
        """Whether clients should go elsewhere."""
        return self._leaving or self.draining

    def __len__(self) -> int:
        return len(self._running)

    def check(self) -> None:
        """Raises Unavailable while draining."""
        if self.draining:
            raise Unavailable(CLOSING)

    def enter(self, running: Running) -> None:
        self._last = asyncio.get_running_loop().time()
        self._running[running.request.id] = running
        self._empty.clear()

    def hold(self, connection: str, seconds: float) -> None:
        """A connection is used that takes its requests elsewhere within so many seconds (of all connections the same)
        of its first use, however long it pauses before."""
        now = asyncio.get_running_loop().time()
        while self._held and next(iter(self._held.values())) <= now:
            del self._held[next(iter(self._held))]
        self._held.setdefault(connection, now + seconds)

    def leave(self, running: Running) -> None:
        self._running.pop(running.request.id, None)
        if not self._running:
            self._empty.set()

    def abort(self, request_id: str, identity: Identity) -> bool:
        """End a request of the identity; False when it has none of that id running. Tenants of a share group have the
        salt in common, keys without a tenant the tenant."""
        running = self._running.get(request_id)
        if running is None or (running.request.salt, running.request.tenant) != (identity.salt, identity.tenant):
            return False
        running.abort(Cancelled("the request was aborted"))
        return True

    async def left(self, timeout: float, quiet: float) -> None:
        """Say so from now on, and return once nobody comes any more: no new request for so many quiet seconds, no
        connection held; after timeout seconds at the latest."""
        self._leaving = True
        time = asyncio.get_running_loop().time
        deadline = time() + timeout
        while True:
            held = next(reversed(self._held.values()), -math.inf)
            wait = min(deadline, max(self._last + quiet, held)) - time()
            if wait <= 0:
                return
            await asyncio.sleep(wait)

    async def drained(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some still ran after timeout seconds,
        which are then aborted."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            for running in list(self._running.values()):
                running.abort(Unavailable(CLOSING))
            return False
        return True
