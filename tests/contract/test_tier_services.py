"""What any TierService does for the engine above it: in this process and in the worker's own, over every memory."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pdserve.core.batch import Batch
from pdserve.core.blocks import BlockHash
from pdserve.core.endpoint import new_epoch
from pdserve.core.errors import ConfigError, EngineDied
from pdserve.core.layout import KVOrder
from pdserve.core.tiers import Tier, TierNews, TierService
from pdserve.tiers.service import LocalTierService
from pdserve.tiers.spec import TierSpec
from pdserve.transfer.memory import TensorMemory
from pdserve.transfer.service import LocalTransferService
from pdserve.worker.local import LocalWorker
from pdserve.worker.service import WorkerHandle, WorkerSpec, open_worker
from pdserve.worker.worker import WorkerOptions, build_worker
from tests.checkpoints import make_checkpoint
from tests.contract.worker_batches import BLOCK_SIZE, prefill
from tests.unit.tiers.blocks import name

NUM_BLOCKS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("worker"), "llama")


@dataclass
class Subject:
    """A worker with tiers, whose blocks are compared by digest."""

    worker: WorkerHandle

    @property
    def tiers(self) -> TierService:
        assert self.worker.tiers is not None
        return self.worker.tiers

    async def compute(self, step: int, blocks: tuple[int, ...]) -> None:
        """Fill blocks with KV."""
        batch: Batch = prefill(step, blocks)
        handle = self.worker.executor.forward(batch)
        self.worker.executor.sample(handle)
        await self.worker.executor.collect(handle)

    async def digest(self, block: int) -> bytes:
        return await self.worker.transfer.digest((block,), BLOCK_SIZE, 1)


def spec_of(checkpoint: Path, folder: Path, order: KVOrder) -> WorkerSpec:
    return WorkerSpec(
        model=checkpoint,
        engine_id="u",
        epoch=new_epoch(),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        device="cpu",
        order=order,
        backends=("shared_memory",),
        tiers=TierSpec(host_bytes=2**14, disk_path=folder, disk_bytes=2**20),
    )


async def open_on_tensor(spec: WorkerSpec) -> LocalWorker:
    """A worker whose KV lies in memory that torch allocated, as on a GPU: reached by copies only."""
    options = WorkerOptions(num_blocks=spec.num_blocks, block_size=spec.block_size, order=spec.order)
    worker = build_worker(spec.model, options)
    memory = TensorMemory(worker.kv.memory)
    assert spec.tiers
    tiers = await LocalTierService.open(
        spec.tiers, name=spec.engine_id, layout=worker.layout, memory=memory, computed_by="this test"
    )
    transfer = await LocalTransferService.open(
        engine_id=spec.engine_id, epoch=spec.epoch, layout=worker.layout, memory=memory, backends=()
    )
    return LocalWorker(worker, transfer, tiers)


@pytest.fixture(
    params=[
        ("inproc", KVOrder.BLOCK_MAJOR),
        ("inproc", KVOrder.LAYER_MAJOR),
        ("process", KVOrder.BLOCK_MAJOR),
        ("tensor", KVOrder.BLOCK_MAJOR),
        ("tensor", KVOrder.LAYER_MAJOR),
    ]
)
async def subject(checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    mode, order = request.param
    spec = spec_of(checkpoint, tmp_path, order)
    worker = await (open_on_tensor(spec) if mode == "tensor" else open_worker(spec, mode))
    yield Subject(worker)
    await worker.close()


def where(news: TierNews) -> dict[BlockHash, Tier | None]:
    return dict(news.changes)


async def test_blocks_come_back_bit_by_bit_up_to_the_first_that_is_missing(subject: Subject) -> None:
    assert where(await subject.tiers.contents()) == {}
    await subject.compute(0, (0, 1, 2))
    wanted = [await subject.digest(block) for block in range(2)]
    news = await subject.tiers.save(((name(0), 0), (name(1), 1)), ())
    assert where(news).keys() == {name(0), name(1)}
    receipt = await subject.tiers.restore((name(0), name(1), name(9)), (7, 5, 6))
    assert receipt.num_blocks == 2
    assert [await subject.digest(block) for block in (7, 5)] == wanted
    assert sum(read.blocks for read in receipt.reads) == 2
    assert all(read.seconds > 0 for read in receipt.reads)
    assert sum(tally.restored_blocks for tally in receipt.news.tallies) == 2


async def test_what_the_host_tier_gave_up_comes_back_from_disk(subject: Subject) -> None:
    await subject.compute(0, (0, 1, 2))
    wanted = await subject.digest(1)
    slots = 2**14 // subject.worker.layout.block_bytes
    held: dict[BlockHash, Tier | None] = {}
    for number in range(slots + 8):
        held |= where(await subject.tiers.save(((name(number), 1),), ()))
    async with asyncio.timeout(20):
        while Tier.DISK not in held.values():
            held |= where(await subject.tiers.contents())
    lost = next(block_hash for block_hash, tier in held.items() if tier is Tier.DISK)
    receipt = await subject.tiers.restore((lost, name(slots + 7)), (4, 6))
    assert receipt.num_blocks == 2
    assert {read.tier for read in receipt.reads} == set(Tier)
    assert [await subject.digest(block) for block in (4, 6)] == [wanted, wanted]


async def test_lists_that_do_not_pair_up_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="do not pair up"):
        await subject.tiers.restore((name(0),), (1, 2))


async def test_what_went_to_disk_is_there_for_the_next_incarnation(checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_of(checkpoint, tmp_path, KVOrder.BLOCK_MAJOR)
    first = Subject(await open_worker(spec, "inproc"))
    await first.compute(0, (0, 1, 2))
    block_bytes = first.worker.layout.block_bytes
    slots = 2**14 // block_bytes
    # Under many names, so that some must leave the host tier.
    names = [name(number) for number in range(slots + 8)]
    for block_hash in names:
        await first.tiers.save(((block_hash, 0),), ())
    wanted = await first.digest(0)
    await first.worker.close()
    second = Subject(await open_worker(replace(spec, epoch=new_epoch(), order=KVOrder.LAYER_MAJOR), "inproc"))
    held = where(await second.tiers.contents())
    assert held
    assert set(held.values()) == {Tier.DISK}
    receipt = await second.tiers.restore(tuple(held)[:1], (3,))
    assert receipt.num_blocks == 1
    assert await second.digest(3) == wanted
    await second.worker.close()
    third = await open_worker(replace(spec, block_size=BLOCK_SIZE * 2), "inproc")
    assert third.tiers is not None
    assert where(await third.tiers.contents()) == {}, "blocks of another size are not its"
    await third.close()


async def test_a_worker_without_tiers_has_none(checkpoint: Path, tmp_path: Path) -> None:
    spec = replace(spec_of(checkpoint, tmp_path, KVOrder.BLOCK_MAJOR), tiers=None)
    worker = await open_worker(spec, "inproc")
    assert worker.tiers is None
    await worker.close()


async def test_tiers_that_cannot_be_are_the_operators_error(checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_of(checkpoint, tmp_path, KVOrder.BLOCK_MAJOR)
    with pytest.raises(ConfigError, match=r"kv\.tiers\.host: 10 bytes hold no block"):
        await open_worker(replace(spec, tiers=TierSpec(host_bytes=10)), "inproc")


async def test_a_killed_worker_ends_what_waits_and_leaves_its_disk_to_the_next(
    checkpoint: Path, tmp_path: Path
) -> None:
    spec = spec_of(checkpoint, tmp_path, KVOrder.BLOCK_MAJOR)
    worker = await open_worker(spec, "process")
    assert worker.tiers is not None
    os.kill(worker.pid, signal.SIGSTOP)
    waiting = asyncio.ensure_future(worker.tiers.restore((name(0),), (1,)))
    await asyncio.sleep(0)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="killed by SIGKILL"):
        await waiting
    with pytest.raises(EngineDied):
        await worker.tiers.save(((name(0), 0),), ())
    await worker.close()
    again = await open_worker(replace(spec, epoch=new_epoch()), "process")
    assert again.tiers is not None
    await again.tiers.contents()
    await again.close()
