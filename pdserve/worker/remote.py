"""A worker in a process of its own, behind the same protocols as one in this process."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.config.times import Times
from pdserve.core.batch import Batch, StepOutput
from pdserve.core.errors import EngineDied
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo, StepHandle
from pdserve.transfer.stats import TransferStats
from pdserve.worker.frames import Forward, GetStats, Sample, Start, Started
from pdserve.worker.link import WorkerLink
from pdserve.worker.remote_tiers import RemoteTiers
from pdserve.worker.remote_transfer import CALL_DEADLINE, RemoteTransfer
from pdserve.worker.spec import STEP_DEADLINE, WorkerSpec

MAX_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class RemoteWorker:
    """Implements service.WorkerHandle. Open with `open`, on the event loop it is used on."""

    link: WorkerLink
    executor: "RemoteExecutor"
    transfer: RemoteTransfer
    started: Started
    tiers: RemoteTiers | None

    @classmethod
    async def open(cls, spec: WorkerSpec, times: Times) -> "RemoteWorker":
        """Start the process on this machine, and begin."""
        listener = None if spec.place is None else spec.place.listener
        link = await WorkerLink.spawn(spec.threads, () if listener is None else (listener,))
        return await cls.begin(link, spec, times)

    @classmethod
    async def begin(cls, link: WorkerLink, spec: WorkerSpec, times: Times) -> "RemoteWorker":
        """Have an empty worker process load the model within times.start_timeout. From then on it is killed when it is
        silent for times.fence.

        Raises CheckpointError or ConfigError as the worker does, EngineDied when the process ends or is late.
        """
        try:
            started = await link.call(lambda reply: Start(reply, spec), Started, times.start_timeout)
        except BaseException:
            link.kill()
            await link.close()
            raise
        link.watch(times)
        transfer = RemoteTransfer(link, started.layout, started.address)
        tiers = RemoteTiers(link) if started.has_tiers else None
        return cls(link, RemoteExecutor(link), transfer, started, tiers)

    @property
    def info(self) -> ModelInfo:
        return self.started.info

    @property
    def layout(self) -> KVLayout:
        return self.started.layout

    @property
    def pid(self) -> int:
        return self.link.pid

    async def death(self) -> EngineDied:
        return await self.link.ended()

    async def transfer_stats(self) -> TransferStats:
        return await self.link.call(GetStats, TransferStats, CALL_DEADLINE)

    async def close(self) -> None:
        await self.link.close()


@dataclass(slots=True, eq=False)
class _Step:
    step: int
    output: "asyncio.Future[StepOutput] | None" = field(default=None)

    @property
    def done(self) -> bool:
        return self.output is not None and self.output.done()


class RemoteExecutor:
    """Executor whose steps run in the worker process. Used on one event loop."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link
        self._in_flight: list[_Step] = []

    def forward(self, batch: Batch) -> StepHandle:
        """Send a step. RuntimeError when two are in flight or the one before is not sampled yet."""
        self._in_flight = [earlier for earlier in self._in_flight if not earlier.done]
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise RuntimeError(f"{MAX_IN_FLIGHT} steps are in flight; collect one before step {batch.step}")
        if self._in_flight and self._in_flight[-1].output is None:
            raise RuntimeError(f"step {self._in_flight[-1].step} must be sampled before step {batch.step}")
        self._link.send(Forward(batch))
        step = _Step(batch.step)
        self._in_flight.append(step)
        return step

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        step = _own(handle)
        if step.output is not None:
            raise RuntimeError(f"step {step.step} is already sampled")
        reply, output = self._link.expect(StepOutput)
        self._link.send(Sample(reply, step.step, None if masks is None else tuple(masks)))
        step.output = output

    async def collect(self, handle: StepHandle) -> StepOutput:
        """The step's tokens. Cancelling the wait leaves the step and the worker as they are."""
        step = _own(handle)
        if step.output is None:
            if self._link.death is not None:
                raise self._link.death
            raise RuntimeError(f"step {step.step} must be sampled before it is collected")
        try:
            async with asyncio.timeout(STEP_DEADLINE):
                return await asyncio.shield(step.output)
        except TimeoutError:
            raise EngineDied(f"step {step.step} took longer than {STEP_DEADLINE:g} s") from None


def _own(handle: StepHandle) -> _Step:
    if not isinstance(handle, _Step):
        raise TypeError(f"{handle!r} is not a handle of this executor")
    return handle
