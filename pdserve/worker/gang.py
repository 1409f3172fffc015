"""The ranks of one engine, each a worker process, as one worker: the same batches for all, and one fate."""

import asyncio
import socket
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from pdserve.config.times import Times
from pdserve.core.batch import Batch, StepOutput
from pdserve.core.errors import ConfigError, EngineDied
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo, StepHandle
from pdserve.transfer.stats import TransferStats, total_stats
from pdserve.worker.gang_tiers import GangTiers
from pdserve.worker.gang_transfer import GangTransfer
from pdserve.worker.rank_door import RankDoor
from pdserve.worker.remote import RemoteExecutor, RemoteWorker
from pdserve.worker.spec import RankPlace, WorkerSpec

LOOPBACK = "127.0.0.1"
"""Where ranks of one machine meet: gloo authenticates nobody."""

REASON_DEADLINE = 2.0
"""Seconds until the end of a rank is known after others have noticed it."""


class WorkerGang:
    """Implements service.WorkerHandle. Open with `open`, on the event loop it is used on.

    A rank that ends takes the others with it: they may be waiting for it in the midst of a step, for ever.
    """

    def __init__(self, ranks: Sequence[RemoteWorker], door: RankDoor | None = None) -> None:
        self.ranks = tuple(ranks)
        self._door = door
        self.transfer = GangTransfer([rank.transfer for rank in ranks])
        tiers = [rank.tiers for rank in ranks if rank.tiers]
        self.tiers = GangTiers(tiers) if tiers else None
        self._death = asyncio.create_task(self._die_together(), name="worker gang")
        self.executor = GangExecutor([rank.executor for rank in ranks], self._death)

    @classmethod
    async def open(cls, spec: WorkerSpec, times: Times, door: RankDoor | None = None) -> "WorkerGang":
        """Start a process per rank and load each one's part of the model within times.start_timeout. With a door, which
        is the gang's from now on, only the first ranks are on this machine, and the hosts of the others come there.

        Raises CheckpointError or ConfigError as the ranks do, EngineDied when one ends or is late.
        """
        address = spec.host if door else LOOPBACK
        try:
            with closing(socket.create_server((address, 0))) as meeting:
                ranks = await _all_or_none(_openings(spec, times, address, meeting, door))
            gang = cls(ranks, door)
            if odd := _odd_one(ranks):
                await gang.close()
                raise ConfigError(odd)
            return gang
        except BaseException:
            if door:
                await door.close()
            raise

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
        if self._door:
            await self._door.close()

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


def _openings(
    spec: WorkerSpec, times: Times, address: str, meeting: socket.socket, door: RankDoor | None
) -> list[Coroutine[None, None, RemoteWorker]]:
    """One per rank. They meet at the socket, which the first one inherits; address is this machine's."""

    def place(rank: int, at: str) -> WorkerSpec:
        listener = None if rank else meeting.fileno()
        where = RankPlace(rank=rank, meeting=meeting.getsockname()[:2], listener=listener, address=at)
        return replace(spec, place=where)

    async def elsewhere(rank: int, door: RankDoor) -> RemoteWorker:
        link = await door.meet(rank, times.start_timeout)
        at = door.address(rank)
        return await RemoteWorker.begin(link, replace(place(rank, at), host=at), times)

    ranks = range(spec.tensor_parallel)
    here = ranks[: door.ranks_each] if door else ranks
    openings = [RemoteWorker.open(place(rank, address), times) for rank in here]
    if door:
        openings += [elsewhere(rank, door) for rank in ranks[door.ranks_each :]]
    return openings


def _odd_one(ranks: Sequence[RemoteWorker]) -> str:
    """Why the ranks, perhaps on several machines, cannot be one worker; empty if they can."""
    first = ranks[0].info
    for number, rank in enumerate(ranks):
        if rank.info.revision != first.revision:
            return (
                f"rank {number} has loaded another model, or revision of it, than rank 0; give all hosts the same files"
            )
        if rank.info.numerics != first.numerics:
            return f"rank {number} rounds as {rank.info.numerics} and rank 0 as {first.numerics}; use hosts of one kind"
    return ""


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
