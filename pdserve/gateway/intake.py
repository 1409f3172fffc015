"""Which requests run, and whether more may come."""

import asyncio
from typing import Protocol

from pdserve.core.errors import Unavailable
from pdserve.core.request import Request
from pdserve.gateway.auth import Identity


class Running(Protocol):
    """A request that runs and can be ended from elsewhere."""

    @property
    def request(self) -> Request: ...

    def abort(self) -> None: ...


class Intake:
    """The door. While draining it lets nobody in; drained() tells when the last one left."""

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._running)

    def check(self) -> None:
        """Raises Unavailable while draining."""
        if self.draining:
            raise Unavailable("the server is shutting down; another one will answer")

    def enter(self, running: Running) -> None:
        self._running[running.request.id] = running
        self._empty.clear()

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
        running.abort()
        return True

    async def drained(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some still ran after timeout seconds,
        which are then aborted."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            for running in list(self._running.values()):
                running.abort()
            return False
        return True
