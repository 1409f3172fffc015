"""A worker in this process, one in its own and one of two ranks: the same tokens, digests, transfers and errors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from pdserve.core.endpoint import new_epoch
from pdserve.core.errors import CheckpointError, ConfigError, DigestMismatch, EngineDied, StaleEpoch, TransferFailed
from pdserve.core.layout import KVOrder
from pdserve.core.protocols import PullSpec
from pdserve.core.shards import KVPart, plan_parts
from pdserve.model.loader import load_model
from pdserve.model.parallel import ParallelContext
from pdserve.transfer.digest import region_digest
from pdserve.transfer.memory import TensorMemory
from pdserve.worker.service import WorkerHandle, WorkerMode, WorkerSpec, open_worker
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import make_checkpoint
from tests.contract.worker_batches import BLOCK_SIZE, PROMPT, decode, prefill, resume, run
from tests.ranks import on_ranks
from tests.stepping import Stepper

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCKS = (7, 2, 11)
NUM_BLOCKS = 24
SEED = 12345


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("worker"), "qwen3")


@dataclass(frozen=True)
class Oracle:
    """What the model computes when it is run step by step by hand."""

    tokens: tuple[int, ...]
    digests: tuple[bytes, ...]
    """Of the prompt's KV, by rank."""


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, workers: "Workers") -> Oracle:
    def compute(ranks: ParallelContext) -> tuple[tuple[int, ...], bytes]:
        loaded = load_model(checkpoint, parallel=ranks)
        stepper = Stepper(loaded, WorkerOptions(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE))
        sequence = stepper.sequence(PROMPT)
        first = stepper.generate(sequence, 1)
        held = stepper.kv.layout
        region = held.whole_blocks(tuple(sequence.block_ids))
        digest = region_digest(TensorMemory(stepper.kv.memory), held, region, SEED)
        return (*first, *stepper.generate(sequence, 3)), digest

    tokens, digests = zip(*on_ranks(workers.num_ranks, compute), strict=True)
    return Oracle(tokens[0], digests)


def spec(checkpoint: Path, engine_id: str, **other: object) -> WorkerSpec:
    base = WorkerSpec(
        model=checkpoint, engine_id=engine_id, epoch=new_epoch(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE
    )
    return replace(base, **other)  # type: ignore[arg-type]


@dataclass
class Workers:
    """Two workers of one mode, as prefill and decode, each with the number of its next step."""

    prefill: WorkerHandle
    decode: WorkerHandle
    steps: dict[str, int]

    @property
    def num_ranks(self) -> int:
        return len(self.prefill.transfer.address.ranks)

    @property
    def parts(self) -> tuple[KVPart, ...]:
        """Who reads what from whom; with one rank each, everything."""
        return plan_parts(self.prefill.transfer.address.shards, self.decode.transfer.address.shards)

    async def digests(self) -> tuple[bytes, ...]:
        """Of the prompt on the prefill worker, by part."""
        digest = self.prefill.transfer.digest
        return tuple([await digest(BLOCKS, len(PROMPT), SEED, part) for part in self.parts])

    def step(self, worker: str) -> int:
        self.steps[worker] += 1
        return self.steps[worker] - 1


@pytest_asyncio.fixture(
    loop_scope="module", scope="module", params=[("inproc", 1), ("process", 1), ("process", 2)], ids=str
)
async def workers(request: pytest.FixtureRequest, checkpoint: Path) -> AsyncIterator[Workers]:
    mode: WorkerMode = request.param[0]
    async with AsyncExitStack() as stack:
        opened: list[WorkerHandle] = []
        for engine_id, order in (("p", KVOrder.BLOCK_MAJOR), ("d", KVOrder.LAYER_MAJOR)):
            wanted = spec(checkpoint, engine_id, order=order, tensor_parallel=request.param[1])
            opened.append(await open_worker(wanted, mode))
            stack.push_async_callback(opened[-1].close)
        yield Workers(prefill=opened[0], decode=opened[1], steps={"p": 0, "d": 0})


async def prefilled(workers: Workers) -> int:
    """Compute the prompt on the prefill worker in two chunks; the first token."""
    batches = (
        prefill(workers.step("p"), BLOCKS, end=20),
        prefill(workers.step("p"), BLOCKS, start=20),
    )
    *_, (first,) = [tokens async for tokens in run(workers.prefill.executor, *batches)]
    return first


def pull_spec(workers: Workers, digest: bytes, targets: tuple[int, ...] = (1, 0, 20), part: int = 0) -> PullSpec:
    return PullSpec(
        peer="p",
        epoch=workers.prefill.transfer.address.epoch,
        source_blocks=BLOCKS,
        target_blocks=targets,
        digest=digest,
        seed=SEED,
        deadline=10,
        start_within=10,
        part=workers.parts[part],
    )


async def test_the_worker_describes_its_model_and_memory(workers: Workers) -> None:
    for worker, order in ((workers.prefill, KVOrder.BLOCK_MAJOR), (workers.decode, KVOrder.LAYER_MAJOR)):
        assert worker.info.vocab_size > 256
        assert (worker.layout.num_blocks, worker.layout.block_size, worker.layout.order) == (24, 16, order)
        assert worker.transfer.layout == worker.layout
        assert worker.transfer.address.layout_hash == worker.layout.wire_hash
        assert [name for name, _ in worker.transfer.address.ranks[0].backends] == ["nixl", "shared_memory", "grpc"]


async def test_equal_workers_round_alike_and_say_so(workers: Workers) -> None:
    assert workers.prefill.info.numerics == workers.decode.info.numerics
    assert torch.__version__ in workers.prefill.info.numerics
    assert f"ranks: {len(workers.prefill.transfer.address.ranks)}," in workers.prefill.info.numerics


async def test_batches_give_the_tokens_and_the_kv_the_model_gives(workers: Workers, oracle: Oracle) -> None:
    first = await prefilled(workers)
    batches = [decode(workers.step("p"), (*BLOCKS, 3), len(PROMPT) + i, None if i else first) for i in range(3)]
    rest = [tokens async for tokens in run(workers.prefill.executor, *batches)]
    assert (first, *(token for tokens in rest for token in tokens)) == oracle.tokens
    assert await workers.digests() == oracle.digests


async def test_a_pulled_prompt_continues_with_the_same_tokens(workers: Workers, oracle: Oracle) -> None:
    first = await prefilled(workers)
    digests = await workers.digests()
    chosen = await workers.decode.transfer.connect(workers.prefill.transfer.address)
    pulls = [
        workers.decode.transfer.pull(pull_spec(workers, digest, part=number)) for number, digest in enumerate(digests)
    ]
    receipts = [await pull.wait() for pull in pulls]
    for pull in pulls:
        await asyncio.wait_for(pull.settled(), 5)
    assert {receipt.backend for receipt in receipts} == set(chosen.split("+"))
    num_bytes = sum(receipt.num_bytes for receipt in receipts)
    assert num_bytes == 3 * workers.decode.layout.block_bytes
    batches = [resume(workers.step("d"), (1, 0, 20), first)]
    batches += [decode(workers.step("d"), (1, 0, 20), len(PROMPT) + i, None) for i in (1, 2)]
    rest = [tokens async for tokens in run(workers.decode.executor, *batches)]
    assert (first, *(token for tokens in rest for token in tokens)) == oracle.tokens
    moved = dict((await workers.decode.transfer_stats()).bytes_by_backend)
    assert sum(moved[name] for name in chosen.split("+")) >= num_bytes


async def test_spare_blocks_are_filled_by_a_seed_and_the_machine_is_told(workers: Workers) -> None:
    source, target = workers.prefill.transfer, workers.decode.transfer
    spare, digests = (20, 21), []
    for seed in (1, 2, 1):
        await source.fill(spare, seed)
        digests.append([await source.digest(spare, 2 * BLOCK_SIZE, SEED, part) for part in workers.parts])
    assert digests[0] == digests[2]
    assert all(one != other for one, other in zip(digests[0], digests[1], strict=True))
    assert len(set(digests[0])) == len(workers.parts)
    assert (await source.facts()).boot_id == (await target.facts()).boot_id
    assert (await target.wire_bytes()).tcp >= 0


async def test_errors_of_a_transfer_keep_their_types(workers: Workers, oracle: Oracle) -> None:
    transfer = workers.decode.transfer
    await transfer.connect(workers.prefill.transfer.address)
    with pytest.raises(DigestMismatch):
        await transfer.pull(pull_spec(workers, bytes(16))).wait()
    with pytest.raises(StaleEpoch):
        await transfer.pull(replace(pull_spec(workers, oracle.digests[0]), epoch=1)).wait()
    with pytest.raises(ValueError, match="named twice"):
        transfer.pull(pull_spec(workers, oracle.digests[0], targets=(1, 1, 2)))
    with pytest.raises(ValueError, match="do not end in the last"):
        await transfer.digest(BLOCKS, 999, SEED, workers.parts[0])
    await transfer.disconnect("p")
    refused = transfer.pull(pull_spec(workers, oracle.digests[0]))
    with pytest.raises(TransferFailed, match="not connected"):
        await refused.wait()
    await asyncio.wait_for(refused.settled(), 5)
    refused.cancel()


async def test_the_order_of_forward_sample_and_collect_is_enforced(workers: Workers) -> None:
    executor = workers.prefill.executor
    first = executor.forward(prefill(workers.step("p"), BLOCKS, end=16))
    with pytest.raises(RuntimeError, match="must be sampled before it is collected"):
        await executor.collect(first)
    with pytest.raises(RuntimeError, match="must be sampled before step"):
        executor.forward(prefill(workers.steps["p"], BLOCKS, start=16, end=32))
    executor.sample(first)
    with pytest.raises(RuntimeError, match="already sampled"):
        executor.sample(first)
    assert (await executor.collect(first)).rows == ()


async def test_cancelling_a_wait_for_tokens_loses_nothing(workers: Workers, oracle: Oracle) -> None:
    executor = workers.prefill.executor
    handle = executor.forward(prefill(workers.step("p"), BLOCKS))
    executor.sample(handle)
    waiting = asyncio.ensure_future(executor.collect(handle))
    await asyncio.sleep(0)
    waiting.cancel()
    assert (await executor.collect(handle)).rows[0].token_ids == oracle.tokens[:1]


@pytest.mark.parametrize("mode", ["inproc", "process"])
async def test_what_the_operator_can_mend_is_said_at_the_start(mode: WorkerMode, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        await open_worker(spec(tmp_path / "absent", "p"), mode)


@pytest.mark.parametrize("mode", ["inproc", "process"])
async def test_a_closed_worker_runs_nothing_and_closes_twice(mode: WorkerMode, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no transfer backend is named 'pigeon'"):
        await open_worker(spec(checkpoint, "p", backends=("pigeon",)), mode)
    worker = await open_worker(spec(checkpoint, "p", backends=()), mode)
    assert worker.transfer.address.ranks[0].backends == ()
    handle = worker.executor.forward(prefill(0, BLOCKS, end=16))
    worker.executor.sample(handle)
    await worker.executor.collect(handle)
    await asyncio.wait_for(worker.close(), 10)
    await asyncio.wait_for(worker.close(), 10)
    with pytest.raises(EngineDied):
        worker.executor.forward(prefill(1, BLOCKS, start=16))
