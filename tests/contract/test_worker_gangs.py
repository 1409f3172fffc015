"""Ranks of one engine: they begin together, end together, and hand KV to engines of other numbers of ranks."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from pdserve.config.times import Times
from pdserve.core.endpoint import new_epoch
from pdserve.core.errors import CheckpointError, ConfigError, DigestMismatch, EngineDied, TransferFailed
from pdserve.core.layout import KVOrder
from pdserve.core.protocols import PullSpec
from pdserve.core.shards import plan_parts
from pdserve.core.ticket import region_seed
from pdserve.worker.gang import WorkerGang
from pdserve.worker.local import LocalWorker
from pdserve.worker.service import WorkerHandle, WorkerSpec, open_worker
from pdserve.worker.spec import RankPlace
from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants, is_gone
from tests.contract.worker_batches import BLOCK_SIZE, PROMPT, decode, prefill, resume, run

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS, TARGETS = (7, 2, 11), (1, 0, 20)
SIZES = (1, 2, 4)
PAIRS = [
    pytest.param(source, target, marks=[pytest.mark.slow] if 4 in (source, target) else [])
    for source in SIZES
    for target in SIZES
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """Two key heads: with four ranks, two of them hold each."""
    path = make_checkpoint(tmp_path_factory.mktemp("gang"), "qwen3")
    return WorkerSpec(
        model=path,
        engine_id="p",
        epoch=new_epoch(),
        num_blocks=24,
        block_size=BLOCK_SIZE,
        backends=("shared_memory",),
    )


@dataclass
class Computed:
    """A worker that has computed the prompt into BLOCKS, and the tokens it said next."""

    worker: WorkerHandle
    tokens: list[int]


class Cluster:
    """Engines by their number of ranks, opened when first asked for, with memory in different orders."""

    def __init__(self, spec: WorkerSpec, stack: AsyncExitStack) -> None:
        self._spec, self._stack = spec, stack
        self._opened: dict[int, Computed] = {}

    async def of(self, size: int) -> Computed:
        if size not in self._opened:
            order = KVOrder.LAYER_MAJOR if size == 2 else KVOrder.BLOCK_MAJOR
            own = replace(self._spec, engine_id=f"e{size}", epoch=new_epoch(), tensor_parallel=size, order=order)
            worker = await open_worker(own, "inproc" if size == 1 else "process")
            self._stack.push_async_callback(worker.close)
            batches = [prefill(0, BLOCKS, end=20), prefill(1, BLOCKS, start=20)]
            batches += [decode(2 + i, (*BLOCKS, 3), len(PROMPT) + i, None) for i in range(3)]
            said = [token async for tokens in run(worker.executor, *batches) for token in tokens]
            self._opened[size] = Computed(worker, said)
        return self._opened[size]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(spec: WorkerSpec) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(spec, stack)


def pull_specs(source: WorkerHandle, target: WorkerHandle, digests: list[bytes]) -> list[PullSpec]:
    address = source.transfer.address
    parts = plan_parts(address.shards, target.transfer.address.shards)
    return [
        PullSpec(
            peer=address.engine_id,
            epoch=address.epoch,
            source_blocks=BLOCKS,
            target_blocks=TARGETS,
            digest=digest,
            seed=region_seed("t", address.epoch, 0, part),
            deadline=10,
            start_within=10,
            part=part,
        )
        for part, digest in zip(parts, digests, strict=True)
    ]


async def digests_for(source: WorkerHandle, target: WorkerHandle) -> list[bytes]:
    address = source.transfer.address
    parts = plan_parts(address.shards, target.transfer.address.shards)
    seeds = [region_seed("t", address.epoch, 0, part) for part in parts]
    return [
        await source.transfer.digest(BLOCKS, len(PROMPT), seed, part) for seed, part in zip(seeds, parts, strict=True)
    ]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
async def test_several_ranks_say_what_one_says(cluster: Cluster, size: int) -> None:
    one, several = await cluster.of(1), await cluster.of(size)
    assert len(one.tokens) == 4
    assert several.tokens == one.tokens


@pytest.mark.parametrize(("source", "target"), PAIRS)
async def test_a_prompt_computed_by_one_number_of_ranks_goes_on_on_another(
    cluster: Cluster, source: int, target: int
) -> None:
    """The target's blocks are overwritten first, so that nothing of an earlier pull can serve."""
    expected = (await cluster.of(1)).tokens
    p, d = (await cluster.of(source)).worker, (await cluster.of(target)).worker
    _ = [tokens async for tokens in run(d.executor, prefill(10, TARGETS, end=1))]
    await d.transfer.connect(p.transfer.address)
    pulls = [d.transfer.pull(one) for one in pull_specs(p, d, await digests_for(p, d))]
    receipts = [await pull.wait() for pull in pulls]
    replicas = max(1, target // 2)
    assert sum(receipt.num_bytes for receipt in receipts) == replicas * len(BLOCKS) * d.layout.block_bytes
    batches = [resume(11, TARGETS, expected[0])]
    batches += [decode(12 + i, (*TARGETS, 5), len(PROMPT) + 1 + i, None) for i in range(2)]
    said = [token async for tokens in run(d.executor, *batches) for token in tokens]
    assert said == expected[1:]


async def test_every_part_is_verified_by_itself(cluster: Cluster) -> None:
    p, d = (await cluster.of(2)).worker, (await cluster.of(1)).worker
    await d.transfer.connect(p.transfer.address)
    digests = await digests_for(p, d)
    for swapped in pull_specs(p, d, digests[::-1]):
        with pytest.raises(DigestMismatch):
            await d.transfer.pull(swapped).wait()


async def test_a_rank_is_asked_only_for_the_heads_it_holds(cluster: Cluster) -> None:
    p, d = (await cluster.of(2)).worker, (await cluster.of(1)).worker
    await d.transfer.connect(p.transfer.address)
    (one, _) = pull_specs(p, d, [bytes(16), bytes(16)])
    assert one.part
    with pytest.raises(TransferFailed, match="does not hold these heads"):
        await d.transfer.pull(replace(one, part=replace(one.part, heads=(1, 2)))).wait()
    with pytest.raises(ValueError, match="say which"):
        p.transfer.pull(replace(one, part=None))


async def test_what_a_rank_refuses_ends_the_others(spec: WorkerSpec, tmp_path: Path) -> None:
    before = descendants(os.getpid())
    with pytest.raises(CheckpointError):
        await asyncio.wait_for(open_worker(replace(spec, model=tmp_path, tensor_parallel=2), "process"), 60)
    assert all(is_gone(pid, 5) for pid in set(descendants(os.getpid())) - set(before))
    with pytest.raises(ConfigError, match="needs a process per rank"):
        await open_worker(replace(spec, tensor_parallel=2), "inproc")


async def test_a_rank_takes_no_device_it_cannot_share_a_model_on(spec: WorkerSpec) -> None:
    place = RankPlace(rank=0, meeting=("127.0.0.1", 1), listener=None, address="127.0.0.1")
    with pytest.raises(ConfigError, match="several ranks compute together on cpu only, and this is cuda"):
        await LocalWorker.open(replace(spec, tensor_parallel=2, place=place, device="cuda"))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
async def test_one_rank_s_death_in_the_midst_of_a_step_is_the_death_of_all(spec: WorkerSpec, victim: int) -> None:
    gang = await WorkerGang.open(replace(spec, tensor_parallel=2), Times())
    try:
        os.kill(gang.ranks[1 - victim].pid, signal.SIGSTOP)
        handle = gang.executor.forward(prefill(0, BLOCKS))
        gang.executor.sample(handle)
        step = asyncio.ensure_future(gang.executor.collect(handle))
        await asyncio.sleep(0.1)
        assert not step.done()
        os.kill(gang.ranks[victim].pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            await asyncio.wait_for(step, 5)
        assert "killed by SIGKILL" in str(await asyncio.wait_for(gang.death(), 5))
        assert all(is_gone(rank.pid, 5) for rank in gang.ranks)
        with pytest.raises(EngineDied):
            gang.executor.forward(prefill(1, BLOCKS))
    finally:
        await asyncio.wait_for(gang.close(), 10)


async def test_a_rank_that_is_frozen_in_the_midst_of_a_step_ends_all(spec: WorkerSpec) -> None:
    gang = await WorkerGang.open(replace(spec, tensor_parallel=2), replace(Times(), heartbeat=0.5, fence=2.0))
    try:
        os.kill(gang.ranks[1].pid, signal.SIGSTOP)
        handle = gang.executor.forward(prefill(0, BLOCKS))
        gang.executor.sample(handle)
        with pytest.raises(EngineDied, match=r"answered nothing for 2 s and was killed"):
            await asyncio.wait_for(gang.executor.collect(handle), 20)
        assert all(is_gone(rank.pid, 5) for rank in gang.ranks)
    finally:
        await asyncio.wait_for(gang.close(), 10)
