"""The Executor inside the engine's own process: one thread that computes, in order of submission."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Protocol

import torch
from torch import Tensor

from pdserve.core.batch import Batch, StepOutput
from pdserve.core.errors import EngineDied
from pdserve.core.protocols import StepHandle

MAX_IN_FLIGHT = 2


class StepRunner(Protocol):
    """Computes steps, on one thread: forward and sample in turn, step by step."""

    def forward(self, batch: Batch) -> Tensor: ...

    def sample(self, batch: Batch, logits: Tensor, masks: Sequence[bytes | None] | None = None) -> StepOutput: ...


Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[StepOutput]"]


@dataclass(slots=True, eq=False)
class SubmittedStep:
    """A step in flight. sampled: whether sample was called, with these masks; logits are there between the end of the
    forward pass and the choice of tokens; result once it has ended, and until then those who wait for it."""

    batch: Batch
    logits: Tensor | None = None
    sampled: bool = False
    masks: Sequence[bytes | None] | None = None
    result: StepOutput | EngineDied | None = None
    waiters: list[Waiter] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.batch.step


class InprocExecutor:
    """Executor over a runner on a thread of its own.

    Not bound to an event loop: collect may be awaited on one after the other. The first error on the thread ends
    the executor: that step and every later one raise EngineDied with the error as cause. A step that takes longer
    than step_timeout seconds counts as death, too. num_threads is torch's, per operation; more than one thread
    on a busy machine costs far more than it gains, and batch invariance is proven for one.
    """

    def __init__(self, runner: StepRunner, *, num_threads: int = 1, step_timeout: float = 300.0) -> None:
        self._runner = runner
        self._num_threads = num_threads
        self._step_timeout = step_timeout
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = Lock()
        self._in_flight: list[SubmittedStep] = []
        self._death: Exception | None = None
        self.death: Future[EngineDied] = Future()
        """Has a result once no step can run any more."""
        self.death.set_running_or_notify_cancel()
        self._thread = Thread(target=self._run, name="pdserve-executor", daemon=True)
        self._thread.start()

    def forward(self, batch: Batch) -> StepHandle:
        """Enqueue a step. RuntimeError when two are in flight or the one before is not sampled yet."""
        step = SubmittedStep(batch)
        with self._lock:
            self._raise_if_dead()
            self._in_flight = [earlier for earlier in self._in_flight if earlier.result is None]
            if len(self._in_flight) >= MAX_IN_FLIGHT:
                raise RuntimeError(f"{MAX_IN_FLIGHT} steps are in flight; collect one before step {batch.step}")
            if self._in_flight and not self._in_flight[-1].sampled:
                raise RuntimeError(f"step {self._in_flight[-1].step} must be sampled before step {batch.step}")
            self._in_flight.append(step)
            self._jobs.put(partial(self._compute, step))
        return step

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        step = _own(handle)
        with self._lock:
            self._raise_if_dead()
            if step.sampled:
                raise RuntimeError(f"step {step.step} is already sampled")
            step.sampled, step.masks = True, masks
            if step.logits is not None:
                self._jobs.put(partial(self._choose, step))

    async def collect(self, handle: StepHandle) -> StepOutput:
        """The step's tokens. Cancelling the wait leaves the step and the executor as they are."""
        step = _own(handle)
        if not step.sampled and step.result is None:
            raise RuntimeError(f"step {step.step} must be sampled before it is collected")
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[StepOutput] = loop.create_future()
        with self._lock:
            if step.result is None:
                step.waiters.append((loop, arrived))
            else:
                _settle(arrived, step.result)
        # asyncio.timeout would do, and takes several times as long.
        late = EngineDied(f"step {step.step} took longer than {self._step_timeout:g} s")
        deadline = loop.call_later(self._step_timeout, _settle, arrived, late)
        try:
            return await arrived
        finally:
            deadline.cancel()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after the work it has; wait at most timeout seconds. May be called again."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while (job := self._jobs.get()) is not None:
                    job()
        except Exception as error:
            self._die(error)
        else:
            self._die(RuntimeError("the executor was closed"))

    def _compute(self, step: SubmittedStep) -> None:
        """And choose tokens at once if sample was called meanwhile: one way between threads per step."""
        logits = self._runner.forward(step.batch)
        with self._lock:
            step.logits = logits
            sampled = step.sampled
        if sampled:
            self._choose(step)

    def _choose(self, step: SubmittedStep) -> None:
        assert step.logits is not None
        logits, step.logits = step.logits, None
        self._sample(step, logits)

    def _sample(self, step: SubmittedStep, logits: Tensor) -> None:
        self._end(step, self._runner.sample(step.batch, logits, step.masks))

    def _end(self, step: SubmittedStep, result: StepOutput | EngineDied) -> None:
        with self._lock:
            step.result = result
            waiters = step.waiters
        for loop, arrived in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, arrived, result)

    def _die(self, error: Exception) -> None:
        with self._lock:
            self._death = error
            unfinished = [step for step in self._in_flight if step.result is None]
        for step in unfinished:
            self._end(step, _died(error))
        self.death.set_result(_died(error))

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise _died(self._death)


def _own(handle: StepHandle) -> SubmittedStep:
    if not isinstance(handle, SubmittedStep):
        raise TypeError(f"{handle!r} is not a handle of this executor")
    return handle


def _settle(arrived: "asyncio.Future[StepOutput]", result: StepOutput | EngineDied) -> None:
    if arrived.done():
        return
    if isinstance(result, EngineDied):
        arrived.set_exception(result)
    else:
        arrived.set_result(result)


def _died(error: Exception) -> EngineDied:
    death = EngineDied(f"the worker stopped: {error}")
    death.__cause__ = error
    return death
