"""An engine that takes as long for a step as the simulator's profile says, whatever its processor does meanwhile:
`python -m benchmarks.paced_engine`, started by `benchmarks.paced_serve` in place of `pdserve.launch.engine`.

The model computes every token and all KV moves as ever, in a small part of that time; the rest is slept. So engines on
one machine do not share what limits them, as engines with an accelerator each do not.
"""

import asyncio
import os
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from pdserve.core.batch import Batch, StepOutput
from pdserve.core.protocols import Executor, StepHandle
from pdserve.launch import engine
from pdserve.launch.child import run_child
from pdserve.simulator.profile import StepCost
from pdserve.worker.service import WorkerHandle, open_worker

ENVIRONMENT = "PDSERVE_BENCHMARK_PACE"
"""The environment variable that names a StepCost, as JSON."""


@dataclass(slots=True)
class PacedExecutor:
    """core.protocols.Executor over another. Steps follow one another as on one device."""

    inner: Executor
    cost: StepCost
    _idle_at: float = 0.0
    _ends: dict[int, float] = field(default_factory=dict)

    def forward(self, batch: Batch) -> StepHandle:
        handle = self.inner.forward(batch)
        self._idle_at = max(self._idle_at, asyncio.get_running_loop().time()) + self.cost.seconds(batch)
        self._ends[batch.step] = self._idle_at
        return handle

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        self.inner.sample(handle, masks)

    async def collect(self, handle: StepHandle) -> StepOutput:
        output = await self.inner.collect(handle)
        left = self._ends.pop(handle.step) - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, left))
        return output


class PacedWorker:
    """A WorkerHandle with another executor."""

    def __init__(self, worker: WorkerHandle, cost: StepCost) -> None:
        self.executor = PacedExecutor(worker.executor, cost)
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


def open_paced(*arguments: Any) -> Awaitable[PacedWorker]:
    """As worker.service.open_worker."""

    async def opened() -> PacedWorker:
        return PacedWorker(await open_worker(*arguments), StepCost.model_validate_json(os.environ[ENVIRONMENT]))

    return opened()


if __name__ == "__main__":
    with patch.object(engine, "open_worker", open_paced):
        run_child(engine.main)
