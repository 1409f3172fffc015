"""The one thread in which a backend lives: it posts reads, polls them to their end, and never forgets one.

Copies may block inside a backend's calls, so none of them runs on an event loop. While reads are in
flight the thread polls with a growing pause, otherwise it sleeps until there is something to do.

An error that no backend is to raise ends the thread. Whether its reads still write can then not be known: they never
end, their targets stay in quarantine, and `failure` tells the owner, whose process has to end.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pdserve.core.errors import EngineDied, PdserveError, TransferFailed
from pdserve.core.failpoints import held
from pdserve.transfer.base import ReadPlan, Transfer, TransferBackend, TransferState

FIRST_PAUSE = 50e-6
"""Seconds between two polls after something happened; doubles up to LONGEST_PAUSE while nothing does."""

LONGEST_PAUSE = 2e-3

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Flight:
    """A read from its submission to its end. on_end(error) is called once, in the pump's thread, when
    nothing is or will be written any more; the error is empty when all bytes arrived. may_start() is asked there, too,
    when the read's turn has come."""

    def __init__(
        self,
        peer_id: str,
        plan: ReadPlan,
        on_end: Callable[[str], None],
        may_start: Callable[[], bool] = lambda: True,
    ) -> None:
        self.peer_id = peer_id
        self.plan = plan
        self.on_end = on_end
        self.may_start = may_start
        self.submitted_at = time.perf_counter()
        self.queue_seconds = self.post_seconds = 0.0
        """How long it waited for the thread, and how long the call took that started it (or did it)."""
        self.started = False
        self.abandoned = False
        self.cancelled = False

    def abandon(self) -> None:
        """Do not start, if it has not started yet. A read under way ends early where its backend can do that."""
        self.abandoned = True


class TransferPump:
    """Owns a backend and its thread. All methods may be called from any thread.

    failure has a result once an unexpected error has ended the thread."""

    def __init__(self, backend: TransferBackend) -> None:
        self.name = backend.name
        self._backend = backend
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._taken: deque[Callable[[], None]] = deque()
        """Out of the inbox, not done yet."""
        self._flights: list[tuple[Flight, Transfer]] = []
        self._leaving: set[str] = set()
        self._closing = False
        self.failure: Future[EngineDied] = Future()
        self.failure.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name=f"kv-{backend.name}", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[TransferBackend], _T]) -> "Future[_T]":
        """Run something on the backend in its thread."""
        future: Future[_T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._check()
                future.set_result(function(self._backend))
            except Exception as error:
                future.set_exception(error)

        if not self._submit(job):
            future.set_exception(RuntimeError(f"the {self.name} backend is closed"))
        return future

    def connect(self, peer_id: str, metadata: bytes) -> "Future[Future[None]]":
        """Begin to make a peer readable; the inner future is the backend's. Fails with TransferFailed, also while reads
        of an earlier connection under this peer_id have not ended."""

        def job(backend: TransferBackend) -> "Future[None]":
            if peer_id in self._busy():
                raise TransferFailed(f"earlier reads from {peer_id} have not ended; connect again when they have")
            self._leaving.discard(peer_id)
            return backend.connect(peer_id, metadata)

        return self.call(job)

    def post(self, flight: Flight) -> None:
        """Start a read as soon as the thread is free."""
        if not self._submit(lambda: self._start(flight)):
            flight.on_end(f"the {self.name} backend is closed")

    def disconnect(self, peer_id: str) -> None:
        """Forget a peer once its last read has ended."""
        self._submit(lambda: self._leaving.add(peer_id))

    def close(self) -> None:
        """Take no more work; the thread closes the backend and ends after the last read has ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self, timeout: float) -> bool:
        """Whether the thread ended within timeout seconds of real time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _submit(self, job: Callable[[], None]) -> bool:
        with self._wake:
            if self._closing:
                return False
            self._inbox.append(job)
            self._wake.notify()
        return True

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            _log.exception("the thread of the %s backend failed", self.name)
            cause = f"{type(error).__name__}: {error}"
            self.failure.set_result(EngineDied(f"the thread of the {self.name} transfer backend failed ({cause})"))
            self.close()
            for job in (*self._taken, *self._inbox):  # whoever waits for one is told
                job()

    def _check(self) -> None:
        """Raises TransferFailed when nothing can be read any more."""
        if self.failure.done():
            raise TransferFailed(f"the {self.name} backend has failed")

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while (jobs := self._next_jobs(pause)) is not None:
            ended = self._poll()
            self._taken.extend(jobs)
            while self._taken:
                self._taken.popleft()()
                # After each one: a read that its call has brought to an end does not wait for the next one's call.
                ended = self._poll() or ended
            self._drop_leaving()
            pause = FIRST_PAUSE if jobs or ended else min(2 * pause, LONGEST_PAUSE)
        self._backend.close()

    def _next_jobs(self, pause: float) -> list[Callable[[], None]] | None:
        """What was submitted, waiting for it at most `pause` while reads are in flight; None at the end."""
        with self._wake:
            if not self._inbox and not (self._closing and not self._flights):
                self._wake.wait(pause if self._flights else None)
            if not self._inbox and not self._flights and self._closing:
                return None
            jobs, self._inbox = self._inbox, []
            return jobs

    def _start(self, flight: Flight) -> None:
        if self.failure.done():
            flight.on_end(f"the {self.name} backend has failed")
            return
        if flight.abandoned:
            flight.on_end("cancelled before it started")
            return
        if not flight.may_start():
            flight.on_end("its turn came too late")
            return
        flight.started = True
        begun = time.perf_counter()
        flight.queue_seconds = begun - flight.submitted_at
        try:
            transfer = self._backend.post(flight.peer_id, flight.plan)
            flight.post_seconds = time.perf_counter() - begun
        except Exception as error:
            if not isinstance(error, PdserveError):
                _log.exception("the %s backend failed to post a read", self.name)
            flight.on_end(str(error) or type(error).__name__)
            return
        self._flights.append((flight, transfer))

    def _poll(self) -> bool:
        """Look at every read in flight once; whether one ended."""
        for flight, transfer in self._flights:
            if flight.abandoned and not flight.cancelled:
                flight.cancelled = True
                transfer.cancel()
        going = [entry for entry in self._flights if not _ended(*entry)]
        ended = len(going) < len(self._flights)
        self._flights = going
        return ended

    def _drop_leaving(self) -> None:
        for peer_id in self._leaving - self._busy():
            self._backend.disconnect(peer_id)
            self._leaving.discard(peer_id)

    def _busy(self) -> set[str]:
        return {flight.peer_id for flight, _ in self._flights}


def _ended(flight: Flight, transfer: Transfer) -> bool:
    state = transfer.poll()
    if state is TransferState.IN_PROGRESS or held("landing"):
        return False
    flight.on_end(transfer.error or "the backend gave no reason" if state is TransferState.ERROR else "")
    return True
