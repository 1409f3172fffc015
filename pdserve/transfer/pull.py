"""One pull under way: its state machine is drawn in engine/handoff_target.py, on an event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from pdserve.core.clock import Clock
from pdserve.core.errors import (
    DigestMismatch,
    LeaseExpired,
    PdserveError,
    TransferError,
    TransferFailed,
    TransferTimeout,
)
from pdserve.core.protocols import PullReceipt, PullSpec
from pdserve.transfer.base import ArrivalDigest, ReadPlan
from pdserve.transfer.lanes import Lane
from pdserve.transfer.pump import Flight
from pdserve.transfer.stats import StatsCounter

_log = logging.getLogger(__name__)

READS = 2
"""A region whose digest differs is read once more before the pull fails."""


@dataclass(frozen=True, slots=True)
class PullContext:
    """What a pull needs of its service: the lanes to the peer, best first, and how and where to digest the target."""

    lanes: Callable[[], Sequence[Lane]]
    target_digest: Callable[[], bytes]
    may_run_along: bool
    """Whether an ArrivalDigest of the spans as they are read equals target_digest."""
    digests: Executor
    clock: Clock
    stats: StatsCounter


@dataclass(frozen=True, slots=True)
class _Landing:
    """The end of a read: why it failed, or what arrived, when (monotonic), and how long digesting it took."""

    error: str = ""
    digest: bytes = b""
    arrived_at: float = 0.0
    verify_seconds: float = 0.0


@dataclass(slots=True)
class _Stages:
    """Seconds spent so far, as in PullReceipt."""

    queue: float = 0.0
    post: float = 0.0
    wire: float = 0.0
    verify: float = 0.0


class LocalPull:
    """Implements core.protocols.Pull. Starts on creation; must be created on the event loop."""

    def __init__(self, spec: PullSpec, plan: ReadPlan, context: PullContext) -> None:
        self._spec, self._plan, self._context = spec, plan, context
        loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[PullReceipt] = loop.create_future()
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._stop_error: TransferError = TransferFailed("the pull was cancelled")
        self._landed: asyncio.Future[_Landing] | None = None
        self._under_way: tuple[Lane, Flight] | None = None
        self._start_until = context.clock.monotonic() + spec.start_within
        context.stats.pulls += 1
        context.stats.unsettled += 1
        self._lanes = context.lanes()
        best = self._lanes[0]
        # Before this thread goes on with whatever else there is to do, and only then comes to the task.
        self._posted = self._post(best) if best.broken_at is None and self._may_start() else None
        self._attempt = asyncio.create_task(self._answer(), name=f"read from {spec.peer}")
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
        """Wait for the answer, the deadline or a stop, then until nothing is written any more."""
        deadline = asyncio.create_task(self._context.clock.sleep(self._spec.deadline))
        await asyncio.wait((self._attempt, deadline, self._stopped), return_when=asyncio.FIRST_COMPLETED)
        if self._stopped.done():
            self._fail(self._stop_error)
        elif not self._attempt.done():
            self._fail(TransferTimeout(f"no KV from {self._spec.peer} within {self._spec.deadline:g} s"))
        self._attempt.cancel()
        deadline.cancel()
        if self._under_way is not None and self._landed is not None:
            _abandon(*self._under_way)
            await asyncio.shield(self._landed)
        self._context.stats.unsettled -= 1

    async def _answer(self) -> None:
        """Read and verify, and tell wait() unless it has an answer already."""
        if self._stopped.done():
            return
        try:
            receipt = await self._read_verified()
        except Exception as error:
            self._fail(error)
            return
        if not self._outcome.done():
            self._context.stats.verified(receipt)
            self._outcome.set_result(receipt)

    async def _read_verified(self) -> PullReceipt:
        """Over the first lane that delivers. A lane is given up only when it has ended: nothing else may read into
        blocks that may still be written."""
        lanes, failovers = self._lanes, list[tuple[str, str]]()
        until = self._context.clock.monotonic() + self._spec.deadline
        for turn, lane in enumerate(lanes, start=1):
            left = until - self._context.clock.monotonic()
            try:
                if self._posted is None:  # else the lane broke after this read was under way
                    await lane.mend(patient=turn == len(lanes))
                return await self._read_over(lane, left / 2 if turn < len(lanes) else None, failovers)
            except TransferFailed as error:
                failure = error
            if turn < len(lanes):
                failovers.append((lane.name, failure.code))
                self._context.stats.given_up(lane.name, failure.code)
        raise failure

    async def _read_over(self, lane: Lane, patience: float | None, failovers: list[tuple[str, str]]) -> PullReceipt:
        """Read and verify over one lane, trying to end a read that is not over after patience seconds."""
        clock, stages = self._context.clock, _Stages()
        for attempt in range(READS):
            self._context.stats.rereads += attempt
            begun = clock.monotonic()
            landing = await self._read(lane, patience, stages)
            stages.wire += landing.arrived_at - begun
            stages.verify += landing.verify_seconds
            if landing.digest == self._spec.digest:
                return PullReceipt(
                    backend=lane.name,
                    num_bytes=self._plan.num_bytes,
                    queue_seconds=stages.queue,
                    post_seconds=stages.post,
                    wire_seconds=max(0.0, stages.wire - stages.queue - stages.post),
                    verify_seconds=stages.verify,
                    failovers=tuple(failovers),
                )
        raise DigestMismatch(f"KV from {self._spec.peer} arrived damaged {READS} times; route the request elsewhere")

    async def _read(self, lane: Lane, patience: float | None, stages: _Stages) -> _Landing:
        posted, self._posted = self._posted, None
        if posted is None:
            if self._outcome.done():
                # A cancellation may be lost on its way here; but who has seen us settle has given the blocks away.
                raise TransferFailed("the pull has ended")
            if not self._may_start():
                raise self._too_late()
            posted = self._post(lane)
        flight, landed = posted
        if patience is not None:
            late = asyncio.create_task(self._context.clock.sleep(patience))
            try:
                await asyncio.wait((late, landed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                late.cancel()
            if not landed.done():
                _abandon(lane, flight)
                lane.broken_at = self._context.clock.monotonic()
        landing: _Landing = await asyncio.shield(landed)
        stages.queue += flight.queue_seconds
        stages.post += flight.post_seconds - (flight.plan.digest.seconds if flight.plan.digest is not None else 0.0)
        if landing.error and not flight.started and not self._may_start():
            raise self._too_late()
        if landing.error:
            raise TransferFailed(f"reading KV from {self._spec.peer} over {lane.name} failed: {landing.error}")
        return landing

    def _post(self, lane: Lane) -> "tuple[Flight, asyncio.Future[_Landing]]":
        """A read and its end."""
        loop = asyncio.get_running_loop()
        self._landed = landed = loop.create_future()

        def tell(landing: _Landing) -> None:
            _tell(loop, partial(self._land, lane, flight, landed, landing))

        plan = self._plan
        if self._context.may_run_along:
            plan = replace(plan, digest=ArrivalDigest(self._spec.seed))
        flight = Flight(lane.key, plan, partial(self._end_of_read, plan, tell), self._may_start)
        self._under_way = lane, flight
        lane.begin(flight)
        lane.pump.post(flight)
        return flight, landed

    def _may_start(self) -> bool:
        return self._context.clock.monotonic() < self._start_until

    def _too_late(self) -> LeaseExpired:
        return LeaseExpired(f"too little of the lease of {self._spec.peer} was left to read (again)")

    def _end_of_read(self, plan: ReadPlan, tell: Callable[[_Landing], None], error: str) -> None:
        """In the pump's thread, which goes on with the next read. What this one brought was digested as it came, or
        else another thread does it."""
        if error:
            tell(_Landing(error))
            return
        arrived = self._context.clock.monotonic()
        if plan.digest is not None and plan.digest.value:
            tell(_Landing("", plan.digest.value, arrived - plan.digest.seconds, plan.digest.seconds))
            return
        try:
            self._context.digests.submit(lambda: tell(self._digested(arrived)))
        except RuntimeError:  # the executor's, when it has been shut down
            tell(_Landing("the transfer service was closed"))

    def _digested(self, arrived: float) -> _Landing:
        """In the digests' thread."""
        begun = time.perf_counter()
        try:
            digest = self._context.target_digest()
        except Exception as error:  # whatever it was: the pull must hear of it
            _log.exception("what a read brought could not be digested")
            return _Landing(f"it could not be digested: {type(error).__name__}")
        return _Landing("", digest, arrived, time.perf_counter() - begun)

    def _land(self, lane: Lane, flight: Flight, landed: "asyncio.Future[_Landing]", landing: _Landing) -> None:
        if landing.error and flight.started and not flight.abandoned:
            lane.broken_at = self._context.clock.monotonic()
        lane.end(flight)
        if not landed.done():
            landed.set_result(landing)

    def _fail(self, error: Exception) -> None:
        if self._outcome.done():
            return
        self._context.stats.failed(error.code if isinstance(error, PdserveError) else PdserveError.code)
        self._outcome.set_exception(error)
        # Read here once: an outcome nobody waits for is no error of the program.
        self._outcome.exception()


def _abandon(lane: Lane, flight: Flight) -> None:
    flight.abandon()
    lane.end(flight)


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
