"""An executor that keeps its device busy: the next step is submitted while the last is still computed."""

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread

from torch import Tensor

from pdserve.core.batch import StepOutput
from pdserve.worker.executor import InprocExecutor, SubmittedStep
from pdserve.worker.graph_runner import GraphRunner

Waiting = tuple[SubmittedStep, Callable[[], StepOutput]]


class OverlappedExecutor(InprocExecutor):
    """InprocExecutor whose thread only submits; a second one waits for tokens, in the order of steps.

    So a step's kernels are queued before the step ahead of it has ended, and the device finds work at once.
    """

    def __init__(self, runner: GraphRunner, *, num_threads: int = 1, step_timeout: float = 300.0) -> None:
        self._ahead = runner
        self._waiting: SimpleQueue[Waiting | None] = SimpleQueue()
        self._waiter = Thread(target=self._wait, name="pdserve-outputs", daemon=True)
        self._waiter.start()
        super().__init__(runner, num_threads=num_threads, step_timeout=step_timeout)

    def _sample(self, step: SubmittedStep, logits: Tensor) -> None:
        self._waiting.put((step, self._ahead.begin_sample(step.batch, logits, step.masks)))

    def _wait(self) -> None:
        """Until the first error: the computing thread then ends, as after one of its own."""
        failed = False
        while (waiting := self._waiting.get()) is not None:
            if failed:
                continue
            step, output = waiting
            try:
                self._end(step, output())
            except Exception as error:
                failed = True
                self._jobs.put(partial(_raise, error))

    def _die(self, error: Exception) -> None:
        """What was submitted still gets its tokens."""
        self._waiting.put(None)
        self._waiter.join(self._step_timeout)
        super()._die(error)


def _raise(error: Exception) -> None:
    raise error
