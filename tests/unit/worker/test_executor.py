"""The executor thread around a real model: order, asynchrony, errors, loops, end."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from pdserve.core.batch import Batch, Row, TokenSource
from pdserve.core.errors import EngineDied
from pdserve.worker.executor import InprocExecutor
from pdserve.worker.worker import Worker, WorkerOptions, build_worker
from tests.checkpoints import make_checkpoint
from tests.stepping import GREEDY

PROMPT = tuple(range(30, 50))
BLOCKS = (3, 1, 2)
SETTINGS = replace(GREEDY, prompt_len=len(PROMPT))


class Gate:
    """Holds the computing thread inside a step until opened."""

    def __init__(self) -> None:
        self.reached, self.open = Event(), Event()

    def __call__(self, batch: Batch, first: int, end: int) -> None:
        self.reached.set()
        assert self.open.wait(30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def worker(checkpoint: Path) -> Iterator[Worker]:
    built = build_worker(checkpoint, WorkerOptions(num_blocks=8))
    yield built
    built.close()


def prefill(step: int = 0) -> Batch:
    row = Row(
        sequence_id=1,
        start=0,
        num_tokens=len(PROMPT),
        token_ids=PROMPT,
        block_ids=BLOCKS,
        sample=True,
        sampler=SETTINGS,
    )
    return Batch(step=step, rows=(row,))


def decode(step: int, *, token_id: int | None = None, start: int | None = None) -> Batch:
    """The next token of the sequence; without token_id its input comes from the step before."""
    row = Row(
        sequence_id=1,
        start=len(PROMPT) + step - 1 if start is None else start,
        num_tokens=1,
        token_ids=() if token_id is None else (token_id,),
        block_ids=BLOCKS,
        token_source=TokenSource.PREVIOUS_STEP if token_id is None else TokenSource.KNOWN,
        sample=True,
    )
    return Batch(step=step, rows=(row,))


async def one_by_one(executor: InprocExecutor, steps: int) -> list[int]:
    tokens: list[int] = []
    for step in range(steps):
        handle = executor.forward(decode(step, token_id=tokens[-1]) if step else prefill())
        executor.sample(handle)
        output = await executor.collect(handle)
        assert output.step == step
        tokens.extend(output.rows[0].token_ids)
    return tokens


async def two_in_flight(executor: InprocExecutor, steps: int) -> list[int]:
    tokens: list[int] = []
    handles = []
    for step in range(steps):
        handles.append(executor.forward(decode(step) if step else prefill()))
        executor.sample(handles[-1])
        if len(handles) == 2:
            tokens.extend((await executor.collect(handles.pop(0))).rows[0].token_ids)
    tokens.extend((await executor.collect(handles.pop())).rows[0].token_ids)
    return tokens


async def test_two_steps_in_flight_give_the_tokens_of_one(worker: Worker) -> None:
    tokens = await one_by_one(worker.executor, 10)
    assert await two_in_flight(worker.executor, 10) == tokens
    assert len(set(tokens)) > 3


def test_it_serves_one_event_loop_after_another(worker: Worker) -> None:
    first = asyncio.run(one_by_one(worker.executor, 3))
    assert asyncio.run(one_by_one(worker.executor, 3)) == first


async def test_a_step_without_samples_has_no_rows(worker: Worker) -> None:
    row = prefill().rows[0]._replace(sample=False, sampler=None)
    handle = worker.executor.forward(Batch(step=0, rows=(row,)))
    worker.executor.sample(handle)
    assert (await worker.executor.collect(handle)).rows == ()


async def test_an_empty_step_only_releases(worker: Worker) -> None:
    await one_by_one(worker.executor, 1)
    handle = worker.executor.forward(Batch(step=1, rows=(), released=(1,)))
    worker.executor.sample(handle)
    assert (await worker.executor.collect(handle)).rows == ()


async def test_released_state_is_dropped_before_the_step(worker: Worker) -> None:
    executor = worker.executor
    await one_by_one(executor, 1)
    handle = executor.forward(replace(decode(1, token_id=5), released=(1,)))
    executor.sample(handle)
    with pytest.raises(EngineDied, match="without ever having been given its settings"):
        await executor.collect(handle)


async def test_submission_returns_while_the_thread_computes(checkpoint: Path) -> None:
    gate = Gate()
    worker = build_worker(checkpoint, WorkerOptions(num_blocks=8), on_layers_done=gate)
    executor = worker.executor
    first = executor.forward(prefill())
    executor.sample(first)
    assert await asyncio.to_thread(gate.reached.wait, 30)
    second = executor.forward(decode(1))
    executor.sample(second)
    with pytest.raises(RuntimeError, match="2 steps are in flight; collect one before step 2"):
        executor.forward(decode(2))
    gate.open.set()
    outputs = [await executor.collect(handle) for handle in (first, second)]
    assert [output.step for output in outputs] == [0, 1]
    worker.close()


async def test_layers_are_reported_in_order_for_each_batch(checkpoint: Path) -> None:
    reports: list[tuple[int, int, int]] = []
    worker = build_worker(
        checkpoint,
        WorkerOptions(num_blocks=8),
        on_layers_done=lambda batch, first, end: reports.append((batch.step, first, end)),
    )
    await two_in_flight(worker.executor, 2)
    worker.close()
    assert reports == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)]


async def test_a_cancelled_wait_leaves_the_step_to_be_collected(checkpoint: Path) -> None:
    gate = Gate()
    worker = build_worker(checkpoint, WorkerOptions(num_blocks=8), on_layers_done=gate)
    handle = worker.executor.forward(prefill())
    worker.executor.sample(handle)
    waiting = asyncio.ensure_future(worker.executor.collect(handle))
    assert await asyncio.to_thread(gate.reached.wait, 30)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open.set()
    assert len((await worker.executor.collect(handle)).rows) == 1
    worker.close()


async def test_an_error_on_the_thread_ends_every_step(worker: Worker) -> None:
    executor = worker.executor
    bad = executor.forward(decode(0, start=5))
    executor.sample(bad)
    with pytest.raises(EngineDied, match="the step before sampled nothing") as caught:
        await executor.collect(bad)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(EngineDied):
        executor.forward(prefill(1))


async def test_a_step_beyond_its_deadline_counts_as_death(checkpoint: Path) -> None:
    gate = Gate()
    worker = build_worker(checkpoint, WorkerOptions(num_blocks=8, step_timeout=0.05), on_layers_done=gate)
    handle = worker.executor.forward(prefill())
    worker.executor.sample(handle)
    with pytest.raises(EngineDied, match=r"step 0 took longer than 0\.05 s"):
        await worker.executor.collect(handle)
    gate.open.set()
    worker.close()


async def test_close_finishes_the_work_it_has_and_takes_no_more(worker: Worker) -> None:
    executor = worker.executor
    done = executor.forward(prefill())
    executor.sample(done)
    unsampled = executor.forward(decode(1))
    executor.close()
    assert len((await executor.collect(done)).rows) == 1
    with pytest.raises(EngineDied, match="the executor was closed"):
        await executor.collect(unsampled)
    with pytest.raises(EngineDied, match="the executor was closed"):
        executor.forward(decode(2))
    executor.close()


async def test_misuse_is_told_at_once(worker: Worker) -> None:
    executor = worker.executor
    handle = executor.forward(prefill())
    with pytest.raises(RuntimeError, match="step 0 must be sampled before it is collected"):
        await executor.collect(handle)
    with pytest.raises(RuntimeError, match="step 0 must be sampled before step 1"):
        executor.forward(decode(1))
    executor.sample(handle)
    with pytest.raises(RuntimeError, match="step 0 is already sampled"):
        executor.sample(handle)
    await executor.collect(handle)
