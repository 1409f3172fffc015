"""The ranks of one engine, each a worker process, as one worker: the same batches for all, and one fate."""

import asyncio
import socket
from collections.abc import Awaitable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from pdserve.config.times import Times
from pdserve.core.batch import Batch, StepOutput
from pdserve.core.errors import EngineDied
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo, StepHandle
from pdserve.transfer.stats import TransferStats, total_stats
from pdserve.worker.gang_tiers import GangTiers
from pdserve.worker.gang_transfer import GangTransfer
from pdserve.worker.remote import RemoteExecutor, RemoteWorker
from pdserve.worker.spec import RankPlace, WorkerSpec

REASON_DEADLINE = 2.0
"""Seconds until the end of a rank is known after others have noticed it."""


class WorkerGang:
    """Implements service.WorkerHandle. Open with `open`, on the event loop it is used on.

    A rank that ends takes the others with it: they may be waiting for it in the midst of a step, for ever.
    """

    def __init__(self, ranks: Sequence[RemoteWorker]) -> None:
        self.ranks = tuple(ranks)
        self.transfer = GangTransfer([rank.transfer for rank in ranks])
        tiers = [rank.tiers for rank in ranks if rank.tiers]
        self.tiers = GangTiers(tiers) if tiers else None
        self._death = asyncio.create_task(self._die_together(), name="worker gang")
        self.executor = GangExecutor([rank.executor for rank in ranks], self._death)

    @classmethod
    async def open(cls, spec: WorkerSpec, times: Times) -> "WorkerGang":
        """Start a process per rank and load each one's part of the model within times.start_timeout.

        Raises CheckpointError or ConfigError as the ranks do, EngineDied when one ends or is late.
        """
        with closing(socket.create_server(("127.0.0.1", 0))) as meeting:
            port = meeting.getsockname()[1]
            places = [RankPlace(rank=0, port=port, listener=meeting.fileno())]
            places += [RankPlace(rank=rank, port=port, listener=None) for rank in range(1, spec.tensor_parallel)]
            specs = [replace(spec, place=place) for place in places]
            return cls(await _all_or_none([RemoteWorker.open(one, times) for one in specs]))

    @property
    def info(self) -> ModelInfo:
        return self.ranks[0].info

    @property
    def layout(self) -> KVLayout:
        return self.ranks[0].layout

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    async def death(self) -> EngineDied:
        return await asyncio.shield(self._death)

    async def transfer_stats(self) -> TransferStats:
        return total_stats(await asyncio.gather(*(rank.transfer_stats() for rank in self.ranks)))

    async def close(self) -> None:
        self._death.cancel()
        await asyncio.gather(*(rank.close() for rank in self.ranks))

    async def _die_together(self) -> EngineDied:
        watches = {asyncio.create_task(rank.death()): rank for rank in self.ranks}
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watch in watches:
                watch.cancel()
        for rank in self.ranks:
            rank.link.kill()
        return done.pop().result()


@dataclass(frozen=True, slots=True, eq=False)
class _GangStep:
    step: int
    handles: tuple[StepHandle, ...]


class GangExecutor:
    """Executor that runs every step on all ranks. Rank 0 chooses the tokens; a step has ended when all ranks have
    written its KV."""

    def __init__(self, ranks: Sequence[RemoteExecutor], death: "asyncio.Future[EngineDied]") -> None:
        self._ranks = tuple(ranks)
        self._death = death

    def forward(self, batch: Batch) -> StepHandle:
        """RuntimeError when two are in flight or the one before is not sampled yet."""
        return _GangStep(batch.step, tuple(rank.forward(batch) for rank in self._ranks))

    def sample(self, handle: StepHandle, masks: Sequence[bytes | None] | None = None) -> None:
        for rank, step in zip(self._ranks, _own(handle).handles, strict=True):
            rank.sample(step, masks)

    async def collect(self, handle: StepHandle) -> StepOutput:
        """The step's tokens. Cancelling the wait leaves the step and the ranks as they are."""
        steps = zip(self._ranks, _own(handle).handles, strict=True)
        try:
            outputs = await asyncio.gather(*(rank.collect(step) for rank, step in steps))
        except EngineDied as error:
            # A rank that lost the others may be heard before it is known how one of them ended, which is the reason.
            known, _ = await asyncio.wait({self._death}, timeout=REASON_DEADLINE)
            raise self._death.result() if known and not self._death.cancelled() else error from None
        return outputs[0]


def _own(handle: StepHandle) -> _GangStep:
    if not isinstance(handle, _GangStep):
        raise TypeError(f"{handle!r} is not a handle of this executor")
    return handle


async def _all_or_none(openings: Sequence[Awaitable[RemoteWorker]]) -> list[RemoteWorker]:
    """All ranks, or the first one's error once nothing is left of the others."""
    tasks = [asyncio.ensure_future(opening) for opening in openings]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for opened in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(opened, RemoteWorker):
                await opened.close()
        raise
