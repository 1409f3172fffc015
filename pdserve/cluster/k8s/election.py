"""Takes part in the election of a leader, and lets it act for as long as it leads."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

import structlog

from pdserve.cluster.k8s.lease import Seen, claim, release, seen
from pdserve.core.clock import Clock
from pdserve.core.errors import Conflict, PdserveError
from pdserve.core.tasks import end

_log = structlog.get_logger(__name__)


class Leases(Protocol):
    """What it needs of KubeClient."""

    def lease(self, name: str) -> Awaitable[dict[str, Any] | None]: ...

    def create_lease(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]: ...

    def replace_lease(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]: ...


class Election:
    """One candidate. Renews, or tries for the Lease, every 2/15 of its length; after 2/3 of it without success a leader
    stops, so that what it has begun ends before another may begin."""

    def __init__(self, leases: Leases, name: str, identity: str, clock: Clock, *, seconds: float) -> None:
        """name: of the Lease. seconds: its length, whole ones."""
        self.identity = identity
        self._leases = leases
        self._name = name
        self._clock = clock
        self._seconds = int(seconds)
        self._retry = seconds * 2 / 15
        self._stop_after = seconds * 2 / 3
        self._seen: Seen | None = None
        self._held_since: float | None = None
        """When the last successful claim was begun."""
        self._trouble = ""

    @property
    def holder(self) -> str:
        """Who is known to lead, "" if nobody is."""
        return self._seen.holder if self._seen else ""

    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._held_since is not None and self._clock.monotonic() < self._held_since + self._stop_after

    async def run(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `lead` whenever, and only while, this process leads; it is cancelled, and waited for, when that ends.
        Cancelled, it gives the Lease back. Raises what lead raises."""
        try:
            while True:
                if await self._claim():
                    _log.info("leads", identity=self.identity, lease=self._name)
                    await self._while_leading(lead)
                    _log.warning("leads no more", identity=self.identity, holder=self.holder)
                await self._clock.sleep(self._pause())
        finally:
            with suppress(PdserveError):
                await self._release()

    def _pause(self) -> float:
        """Before the next try: shorter where the Lease ends first."""
        left = self._seen.ends - self._clock.monotonic() if self._seen else 0.0
        return min(left, self._retry) if left > 0 else self._retry

    async def _while_leading(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        acting, renewing = asyncio.create_task(lead()), asyncio.create_task(self._renew())
        try:
            await asyncio.wait((acting, renewing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end([acting, renewing])
        if acting.done() and not acting.cancelled():
            acting.result()

    async def _renew(self) -> None:
        """Returns when this process leads no more."""
        while self.leads():
            await self._clock.sleep(self._retry)
            attempt = asyncio.create_task(self._claim())
            assert self._held_since is not None
            left = asyncio.create_task(self._until(self._held_since + self._stop_after))
            try:
                await asyncio.wait((attempt, left), return_when=asyncio.FIRST_COMPLETED)
                if not attempt.done():
                    break
            finally:
                await end([attempt, left])
        self._held_since = None

    async def _until(self, moment: float) -> None:
        await self._clock.sleep(max(0.0, moment - self._clock.monotonic()))

    async def _claim(self) -> bool:
        """Hold the Lease from now on, if nobody else does."""
        begun = self._clock.monotonic()
        try:
            held = await self._try_to_claim()
        except Conflict:
            held = False  # somebody was quicker; the next look tells who
        except PdserveError as error:
            if str(error) != self._trouble:
                _log.error("no word on who leads", cause=str(error))
            self._trouble = str(error)
            return False
        self._trouble = ""
        if held:
            self._held_since = begun
        elif self.holder != self.identity:
            self._held_since = None
        return held

    async def _try_to_claim(self) -> bool:
        body = await self._leases.lease(self._name)
        now = self._clock.monotonic()
        self._seen = seen(self._seen, body, now) if body is not None else None
        if self._seen is not None and not self._seen.free_for(self.identity, now):
            return False
        mine = claim(self._seen, self._name, self.identity, self._seconds, self._clock.unix())
        write = self._leases.create_lease if self._seen is None else self._leases.replace_lease
        self._seen = seen(self._seen, await write(mine), self._clock.monotonic())
        return True

    async def _release(self) -> None:
        """At once another's. A renewal that was under way may still arrive, so it is read anew."""
        if self._held_since is None:
            return
        self._held_since = None
        for _ in range(2):
            with suppress(Conflict):
                body = await self._leases.lease(self._name)
                now = self._clock.monotonic()
                if body is not None and (mine := seen(None, body, now)).holder == self.identity:
                    await self._leases.replace_lease(release(mine, self._name, self._clock.unix()))
                return
