"""The step loop: keeps the executor supplied and brings its outputs back to the core, in order."""

import asyncio
from collections import deque
from collections.abc import Callable

from pdserve.core.batch import StepOutput
from pdserve.core.protocols import Executor
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import CoreEvent
from pdserve.engine.step_timing import StepTimer


class StepPump:
    """Runs until cancelled. Raises EngineDied when the worker is gone.

    on_events gets every event of the core that the loop itself causes. Whoever changes the core from
    outside calls `wake`.
    """

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        timer: StepTimer,
        on_events: Callable[[list[CoreEvent]], None],
    ) -> None:
        self._core = core
        self._executor = executor
        self._timer = timer
        self._on_events = on_events
        self._fresh = asyncio.Event()
        self._steps: deque[asyncio.Future[StepOutput]] = deque()

    def wake(self) -> None:
        self._fresh.set()

    async def run(self) -> None:
        while True:
            self._fresh.clear()
            self._submit_steps()
            await self._fresh.wait()
            while self._steps and self._steps[0].done():
                output = self._steps.popleft().result()
                self._timer.completed()
                self._on_events(self._core.complete(output))

    def _submit_steps(self) -> None:
        while batch := self._core.schedule():
            self._timer.submitted(batch)
            handle = self._executor.forward(batch)
            self._executor.sample(handle)
            step = asyncio.ensure_future(self._executor.collect(handle))
            step.add_done_callback(lambda _: self._fresh.set())
            self._steps.append(step)
        self._on_events(self._core.take_events())
