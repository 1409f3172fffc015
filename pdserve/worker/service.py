"""Opening a worker, in this process or in one of its own. Imports torch only when the worker runs here."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Literal, Protocol

from pdserve.config.times import Times
from pdserve.core.errors import ConfigError, EngineDied
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import CheckedTransfer, Executor, ModelInfo
from pdserve.core.tiers import TierService
from pdserve.transfer.stats import TransferStats
from pdserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.worker.rank_door import RankDoor

__all__ = ["WorkerHandle", "WorkerMode", "WorkerSpec", "open_worker"]

WorkerMode = Literal["inproc", "process"]


class WorkerHandle(Protocol):
    """An open worker. Whoever opened it closes it."""

    @property
    def executor(self) -> Executor: ...

    @property
    def transfer(self) -> CheckedTransfer: ...

    @property
    def tiers(self) -> TierService | None:
        """None without a WorkerSpec.tiers."""
        ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def layout(self) -> KVLayout: ...

    @property
    def pid(self) -> int:
        """Of the process the worker, or its rank 0, runs in."""
        ...

    def death(self) -> Awaitable[EngineDied]:
        """Wait until the worker can run nothing any more; with several ranks, one's end is the end of all."""
        ...

    def transfer_stats(self) -> Awaitable[TransferStats]:
        """Raises EngineDied when the worker is gone."""
        ...

    def close(self) -> Awaitable[None]:
        """End steps and transfers and free everything, within a few seconds. May be called again."""
        ...


async def open_worker(
    spec: WorkerSpec, mode: WorkerMode, times: Times | None = None, door: "RankDoor | None" = None
) -> WorkerHandle:
    """Load the model and start the transfer backends, on the running event loop.

    "process" keeps the computation's GIL, torch and NIXL out of this process, and is what several ranks need;
    "inproc" spares a process. door: where hosts of ranks come to that are not on this machine; the worker's from now
    on. Raises CheckpointError or ConfigError for what the operator can mend, EngineDied when a worker process ends or
    is not ready within times.start_timeout. One that is silent for times.fence is killed.
    """
    times = times or Times()
    if spec.tensor_parallel > 1:
        from pdserve.worker.gang import WorkerGang

        if mode == "inproc":
            raise ConfigError(f"tensor_parallel {spec.tensor_parallel} needs a process per rank: set worker to process")
        return await WorkerGang.open(spec, times, door)
    if mode == "process":
        from pdserve.worker.remote import RemoteWorker

        return await RemoteWorker.open(spec, times)
    from pdserve.worker.local import LocalWorker

    return await LocalWorker.open(spec)
