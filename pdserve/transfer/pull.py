"""One pull under way: the state machine drawn in base.py, on an event loop."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from pdserve.core.clock import Clock
from pdserve.core.errors import DigestMismatch, PdserveError, TransferError, TransferFailed, TransferTimeout
from pdserve.core.protocols import PullReceipt, PullSpec
from pdserve.transfer.base import ReadPlan
from pdserve.transfer.pump import Flight, TransferPump
from pdserve.transfer.stats import StatsCounter

READS = 2
"""A region whose digest differs is read once more before the pull fails."""


@dataclass(frozen=True, slots=True)
class PullContext:
    """What a pull needs of its service: the backend and peer it reads from, how to digest the target, and
    whom to tell that a read ended with an error."""

    pump: TransferPump
    peer_id: str
    target_digest: Callable[[], Awaitable[bytes]]
    connection_broke: Callable[[], None]
    clock: Clock
    stats: StatsCounter


class LocalPull:
    """Implements core.protocols.Pull. Starts on creation; must be created on the event loop."""

    def __init__(self, spec: PullSpec, plan: ReadPlan, context: PullContext) -> None:
        self._spec, self._plan, self._context = spec, plan, context
        loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[PullReceipt] = loop.create_future()
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._stop_error: TransferError = TransferFailed("the pull was cancelled")
        self._landed: asyncio.Future[str] | None = None
        self._flight: Flight | None = None
        context.stats.pulls += 1
        context.stats.unsettled += 1
        self.task = asyncio.create_task(self._drive(), name=f"pull from {spec.peer}")

    async def wait(self) -> PullReceipt:
        return await asyncio.shield(self._outcome)

    async def settled(self) -> None:
        await asyncio.shield(self.task)

    def cancel(self) -> None:
        self.stop(TransferFailed("the pull was cancelled"))

    def stop(self, error: TransferError) -> None:
        """Let wait() raise this error, unless it has an answer already."""
        if not self._stopped.done():
            self._stop_error = error
            self._stopped.set_result(None)

    async def _drive(self) -> None:
        """Give wait() its answer, then wait until nothing is written any more."""
        if self._stopped.done():
            self._fail(self._stop_error)
        else:
            await self._race()
        if self._flight is not None and self._landed is not None:
            self._flight.abandon()
            await asyncio.shield(self._landed)
        self._context.stats.unsettled -= 1

    async def _race(self) -> None:
        """Read and verify until that is done, the deadline passes or somebody stops it."""
        attempt = asyncio.create_task(self._read_verified())
        deadline = asyncio.create_task(self._context.clock.sleep(self._spec.deadline))
        await asyncio.wait((attempt, deadline, self._stopped), return_when=asyncio.FIRST_COMPLETED)
        if attempt.done():
            self._answer(attempt)
        elif self._stopped.done():
            self._fail(self._stop_error)
        else:
            self._fail(TransferTimeout(f"no KV from {self._spec.peer} within {self._spec.deadline:g} s"))
        attempt.cancel()
        deadline.cancel()

    async def _read_verified(self) -> PullReceipt:
        clock, wire, verify = self._context.clock, 0.0, 0.0
        for attempt in range(READS):
            self._context.stats.rereads += attempt
            begun = clock.monotonic()
            await self._read()
            arrived = clock.monotonic()
            digest = await self._context.target_digest()
            wire += arrived - begun
            verify += clock.monotonic() - arrived
            if digest == self._spec.digest:
                name, num_bytes = self._context.pump.name, self._plan.num_bytes
                return PullReceipt(backend=name, num_bytes=num_bytes, wire_seconds=wire, verify_seconds=verify)
        raise DigestMismatch(f"KV from {self._spec.peer} arrived damaged {READS} times; route the request elsewhere")

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        self._landed = landed = loop.create_future()
        flight = self._flight = Flight(
            self._context.peer_id, self._plan, lambda error: _tell(loop, partial(self._land, flight, landed, error))
        )
        self._context.pump.post(flight)
        if error := await asyncio.shield(landed):
            raise TransferFailed(f"reading KV from {self._spec.peer} failed: {error}")

    def _land(self, flight: Flight, landed: "asyncio.Future[str]", error: str) -> None:
        if error and flight.started:
            self._context.connection_broke()
        if not landed.done():
            landed.set_result(error)

    def _answer(self, attempt: "asyncio.Task[PullReceipt]") -> None:
        error = attempt.exception()
        if error is None:
            self._context.stats.verified(attempt.result())
            self._outcome.set_result(attempt.result())
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._context.stats.failed(error.code if isinstance(error, PdserveError) else PdserveError.code)
        self._outcome.set_exception(error)
        # Read here once: an outcome nobody waits for is no error of the program.
        self._outcome.exception()


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Run a callback on the loop, from another thread; nobody is left to tell once the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


class FailedPull:
    """A pull refused before anything was read."""

    def __init__(self, error: TransferError) -> None:
        self._error = error

    async def wait(self) -> PullReceipt:
        raise self._error

    async def settled(self) -> None:
        return

    def cancel(self) -> None:
        return
