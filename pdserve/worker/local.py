"""A whole worker, or one rank of one, in this process: model execution and KV transfer over one KV memory."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.core.errors import EngineDied
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo
from pdserve.model.gloo import GlooRanks, meeting_place
from pdserve.model.parallel import ParallelContext
from pdserve.tiers.service import LocalTierService
from pdserve.transfer.backends import make_backends
from pdserve.transfer.memory import HostMemory, KVMemory, TensorMemory
from pdserve.transfer.probe import PROBE_AREA_BYTES
from pdserve.transfer.service import LocalTransferService
from pdserve.transfer.stats import TransferStats
from pdserve.worker.executor import InprocExecutor
from pdserve.worker.spec import STEP_DEADLINE, WorkerSpec, check_ranks
from pdserve.worker.worker import Worker, WorkerOptions, build_worker


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """Implements service.WorkerHandle. Open with `open`."""

    worker: Worker
    transfer: LocalTransferService
    tiers: LocalTierService | None = None

    @classmethod
    async def open(cls, spec: WorkerSpec) -> "LocalWorker":
        """Raises CheckpointError or ConfigError when model, device or a transfer backend is not to be had."""
        worker, memory = await asyncio.to_thread(_build, spec)
        tiers = None
        try:
            if spec.tiers:
                tiers = await LocalTierService.open(
                    spec.tiers,
                    name=_tier_name(spec),
                    layout=worker.layout,
                    memory=memory,
                    computed_by=_computed_by(spec, worker),
                )
            transfer = await LocalTransferService.open(
                engine_id=spec.engine_id,
                epoch=spec.epoch,
                layout=worker.layout,
                shard=worker.shard,
                memory=memory,
                backends=make_backends(spec.backends, spec.engine_id, spec.epoch, spec.host, worker.shard.rank),
            )
        except BaseException:
            if tiers:
                await tiers.close()
            worker.close()
            memory.close()
            raise
        return cls(worker, transfer, tiers)

    @property
    def executor(self) -> InprocExecutor:
        return self.worker.executor

    @property
    def info(self) -> ModelInfo:
        return self.worker.info

    @property
    def layout(self) -> KVLayout:
        return self.worker.layout

    @property
    def pid(self) -> int:
        return os.getpid()

    async def death(self) -> EngineDied:
        """Of what computes, or of what moves KV."""
        deaths = asyncio.wrap_future(self.executor.death), asyncio.create_task(self.transfer.death())
        try:
            done, _ = await asyncio.wait(deaths, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for waiting in deaths:
                waiting.cancel()

    async def transfer_stats(self) -> TransferStats:
        return self.transfer.stats()

    async def close(self) -> None:
        await asyncio.to_thread(self.worker.close)
        if self.tiers:
            await self.tiers.close()
        await self.transfer.close()


def _build(spec: WorkerSpec) -> tuple[Worker, KVMemory]:
    """The worker and the memory its KV lies in: shareable host memory, or what torch allocated on a GPU."""
    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_ranks(spec.tensor_parallel, device)
    options = WorkerOptions(
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        device=device,
        dtype=spec.dtype,
        order=spec.order,
        deterministic=spec.deterministic,
        num_threads=spec.threads,
    )
    if device != "cpu":
        worker = build_worker(spec.model, options)
        return worker, TensorMemory(worker.kv.memory)
    allocated: list[HostMemory] = []
    worker = build_worker(spec.model, options, parallel=_meet(spec), allocate=_allocator(allocated))
    return worker, allocated[0]


def _meet(spec: WorkerSpec) -> ParallelContext | None:
    """Wait for the other ranks of the worker; None when there are none."""
    place = spec.place
    if place is None:
        return None
    store = meeting_place(place.meeting, place.listener, spec.tensor_parallel, STEP_DEADLINE)
    return GlooRanks(store, place.rank, spec.tensor_parallel, place.address, STEP_DEADLINE)


def _tier_name(spec: WorkerSpec) -> str:
    return spec.engine_id if spec.place is None else f"{spec.engine_id}.rank{spec.place.rank}"


def _computed_by(spec: WorkerSpec, worker: Worker) -> str:
    """Whatever, besides model, dtype and block size, may change a bit of KV."""
    return f"{worker.numerics}, deterministic {spec.deterministic}, {worker.shard}"


def _allocator(allocated: list[HostMemory]) -> Callable[[int], memoryview]:
    def allocate(nbytes: int) -> memoryview:
        allocated.append(HostMemory(nbytes + PROBE_AREA_BYTES))
        return allocated[-1].array.data

    return allocate
