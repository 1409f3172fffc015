"""Recorded steps and rows that live on the device, replayed eagerly in Triton's interpreter: the tokens of torch, one
step at a time, whatever the scheduler makes of the requests and however far submission runs ahead."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from pdserve.core.batch import Batch, Row, TokenSource
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import EngineDied
from pdserve.core.layout import KVOrder
from pdserve.core.request import Request, SamplingParams
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import Emitted
from pdserve.model.loader import LoadedModel, load_model
from pdserve.worker.executor import InprocExecutor
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.runner import Runner
from pdserve.worker.worker import WorkerOptions, attention_backend, kv_layout
from tests.checkpoints import make_checkpoint
from tests.stepping import GREEDY

if not find_spec("triton"):
    pytest.skip("needs Triton, which CUDA builds of torch bring along", allow_module_level=True)

from pdserve.attention.triton_backend import TritonAttention
from pdserve.worker.decode_graphs import DecodeGraphs
from pdserve.worker.graph_runner import GraphRunner
from pdserve.worker.graphs import Recorder
from pdserve.worker.overlapped import OverlappedExecutor

BUCKETS = (1, 2, 4)
BLOCK_SIZE = 16
VOCAB = 341
Tokens = dict[str, list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("model"), "qwen3", vocab_size=VOCAB, max_position_embeddings=128, num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def kernels(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, kernels=True, deterministic=False)


@pytest.fixture(scope="module")
def in_torch(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, kernels=False, deterministic=True)


def options(num_blocks: int) -> WorkerOptions:
    return WorkerOptions(num_blocks=num_blocks, block_size=BLOCK_SIZE, order=KVOrder.BLOCK_MAJOR)


def poisoned(loaded: LoadedModel, num_blocks: int) -> KVTensors:
    kv = KVTensors(kv_layout(loaded, options(num_blocks)), device=loaded.device)
    kv.memory.view(loaded.dtype).fill_(float("nan"))
    return kv


def graph_runner(
    loaded: LoadedModel, num_blocks: int, *, deterministic: bool = False, graphs: Recorder | None = None
) -> GraphRunner:
    attention = TritonAttention(
        heads=loaded.config.num_heads,
        kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
        block_size=BLOCK_SIZE,
        dtype=loaded.dtype,
        device=loaded.device,
        deterministic=deterministic,
    )
    return GraphRunner(loaded, attention, poisoned(loaded, num_blocks), graphs=graphs, buckets=BUCKETS)


def request(name: str, rng: Random, *, prompt: int, tokens: int, **settings: float) -> Request:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=rng.randrange(1 << 40), **settings)  # type: ignore[arg-type]
    prompt_token_ids = tuple(rng.randrange(VOCAB - 4) for _ in range(prompt))
    return Request(id=name, prompt_token_ids=prompt_token_ids, sampling=sampling, timeout=600.0)


async def generate(
    executor: InprocExecutor,
    loaded: LoadedModel,
    num_blocks: int,
    limits: EngineLimits,
    arrivals: dict[int, Request],
    aborted: dict[str, int] | None = None,
) -> Tokens:
    """Drive an engine's scheduler over the executor. arrivals: requests by the step they come with; aborted: the step
    with which a request's client is gone."""
    tickets = count()
    core = EngineCore(
        info=loaded.info,
        limits=limits,
        layout=kv_layout(loaded, options(num_blocks)),
        clock=SystemClock(),
        new_ticket_id=lambda: str(next(tickets)),
    )
    pending = dict(arrivals)
    tokens: Tokens = {request.id: [] for request in arrivals.values()}
    leaving = dict(aborted or {})
    ids: dict[str, int] = {}
    handles = []
    step = 0
    while pending or core.has_work:
        while pending and (not core.has_work or min(pending) <= step):
            coming = pending.pop(min(pending))
            ids[coming.id] = core.add(coming)
        for name in [name for name, last in leaving.items() if last <= step and name in ids]:
            del leaving[name]
            core.abort(ids[name])
        while batch := core.schedule():
            core.take_events()
            handles.append(executor.forward(batch))
            executor.sample(handles[-1])
            step = batch.step
        for event in core.complete(await executor.collect(handles.pop(0))):
            if isinstance(event, Emitted):
                tokens[event.request_id].extend(event.token_ids)
    return tokens


async def expected(loaded: LoadedModel, arrivals: dict[int, Request]) -> Tokens:
    """Every request by itself, in torch, one step at a time."""
    tokens: Tokens = {}
    for one in arrivals.values():
        kv, attention = poisoned(loaded, 16), attention_backend(loaded, BLOCK_SIZE, deterministic=True)
        executor = InprocExecutor(Runner(loaded, attention, kv))
        tokens |= await generate(executor, loaded, 16, EngineLimits(max_rows=1, max_model_len=128, depth=1), {0: one})
        executor.close()
    return tokens


def schedule(seed: int, requests: int, prompts: list[int], answers: list[int]) -> dict[int, Request]:
    """Prompts and answers around block borders; all kinds of sampling."""
    rng = Random(seed)
    kinds: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "logprobs": True},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "min_tokens": 3},
    ]
    arrivals, step = {}, 0
    for number in range(requests):
        prompt, tokens = rng.choice(prompts), rng.choice(answers)
        arrivals[step] = request(f"r{number}", rng, prompt=prompt, tokens=tokens, **rng.choice(kinds))
        step += rng.randint(1, 3)
    return arrivals


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many steps each bucket computed, how many samplings were recorded ones, how many steps were staged, and how
    many rows of sequences that had been released before came."""
    counts: Counter[str] = Counter()
    released: set[int] = set()

    def returning(batch: Batch) -> str:
        released.update(batch.released)
        return "preempted" if any(row.sequence_id in released for row in batch.rows) else "steps"

    def counted(owner: type, method: str, name: Callable[..., str]) -> None:
        plain = getattr(owner, method)

        def call(self: object, argument: object) -> object:
            counts[name(argument)] += 1
            return plain(self, argument)

        monkeypatch.setattr(owner, method, call)

    counted(DecodeGraphs, "forward", lambda size: f"bucket {size}")
    counted(DecodeGraphs, "sample", lambda _: "sampled")
    counted(GraphRunner, "_forward_staged", lambda _: "staged")
    counted(GraphRunner, "forward", returning)
    return counts


async def check(
    seed: int,
    kernels: LoadedModel,
    in_torch: LoadedModel,
    *,
    requests: int,
    num_blocks: int,
    prompts: list[int],
    answers: list[int],
) -> None:
    arrivals = schedule(seed, requests, prompts, answers)
    limits = EngineLimits(max_tokens_per_step=40, max_rows=6, chunk_size=16, max_model_len=128, prefix_caching=False)
    executor = OverlappedExecutor(graph_runner(kernels, num_blocks))
    gone = arrivals[min(arrivals)].id
    tokens = await generate(executor, kernels, num_blocks, limits, arrivals, aborted={gone: 4})
    executor.close()
    whole = await expected(in_torch, arrivals)
    assert tokens[gone] == whole[gone][: len(tokens[gone])]
    assert tokens | {gone: whole[gone]} == whole


@pytest.mark.slow
async def test_tokens_are_those_of_torch_around_bucket_borders(
    kernels: LoadedModel, in_torch: LoadedModel, replayed: Counter[str]
) -> None:
    """Buckets of 1, 2 and 4, and blocks for less than all that four sequences come to need: some are preempted."""
    await check(0, kernels, in_torch, requests=4, num_blocks=4, prompts=[10, 12], answers=[10])
    assert set(replayed) == {"bucket 1", "bucket 2", "bucket 4", "sampled", "staged", "steps", "preempted"}, replayed
    assert replayed["sampled"] < sum(replayed[f"bucket {size}"] for size in BUCKETS), "penalties are not recorded"


@pytest.mark.slow
async def test_a_table_that_must_grow_keeps_its_rows(
    kernels: LoadedModel, in_torch: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.worker.device_rows._FIRST_ROWS", 1)
    await check(7, kernels, in_torch, requests=3, num_blocks=16, prompts=[5], answers=[4])


def prompt_row(sequence: int, block: int, **changes: Any) -> Row:
    row = Row(
        sequence_id=sequence,
        start=0,
        num_tokens=3,
        token_ids=(5, 6, 7),
        block_ids=(block,),
        sample=True,
        sampler=replace(GREEDY, prompt_len=3),
    )
    return row._replace(**changes)


def decode_row(sequence: int, block: int, start: int = 3) -> Row:
    return Row(
        sequence_id=sequence,
        start=start,
        num_tokens=1,
        token_ids=(),
        block_ids=(block,),
        token_source=TokenSource.PREVIOUS_STEP,
        sample=True,
    )


def test_masks_hold_in_recorded_steps_and_tokens_come_from_the_step_before(kernels: LoadedModel) -> None:
    runner = graph_runner(kernels, 4)
    only_nine = bytes(1) + b"\x02" + bytes(-(-VOCAB // 8) - 2)
    for step, (rows, masks) in enumerate(
        (
            ((prompt_row(1, 2), prompt_row(2, 3)), None),
            ((decode_row(1, 2), decode_row(2, 3)), (None, only_nine)),
            ((decode_row(2, 3, 4),), None),
        )
    ):
        batch = Batch(step=step, rows=rows)
        output = runner.sample(batch, runner.forward(batch), masks)
        if masks:
            assert output.rows[1].token_ids == (9,)
    after = output.rows[0].token_ids
    told = decode_row(2, 3, 4)._replace(token_ids=(9,), token_source=TokenSource.KNOWN)
    again = Batch(step=3, rows=(told,))
    assert runner.sample(again, runner.forward(again)).rows[0].token_ids == after


def test_a_sequence_that_comes_back_with_other_blocks_is_read_from_them(kernels: LoadedModel) -> None:
    """Released, as after preemption, and computed anew elsewhere, at the same length."""
    runner = graph_runner(kernels, 4)
    outputs = []
    for step, (rows, released) in enumerate(
        (
            ((prompt_row(1, 2),), ()),
            ((decode_row(1, 2),), ()),
            ((prompt_row(1, 0),), (1,)),
            ((decode_row(1, 0),), ()),
        )
    ):
        batch = Batch(step=step, rows=rows, released=released)
        outputs.append(runner.sample(batch, runner.forward(batch)).rows[0].token_ids)
        if step == 1:
            runner._kv.layers[0][2].fill_(float("nan"))
    assert outputs[2:] == outputs[:2]


@pytest.mark.slow
def test_warming_up_leaves_nothing_behind(kernels: LoadedModel) -> None:
    outputs = []
    for warm in (False, True):
        runner = graph_runner(kernels, 4)
        if warm:
            runner.warm_up()
            assert not runner._kv.layers[0][0].any()
            assert runner._kv.layers[0][1:].isnan().all()
        for step, rows in enumerate(((prompt_row(-1, 2), prompt_row(2, 3)), (decode_row(-1, 2), decode_row(2, 3)))):
            batch = Batch(step=step, rows=rows)
            outputs.append(runner.sample(batch, runner.forward(batch)).rows)
    assert outputs[:2] == outputs[2:]


@pytest.mark.parametrize("beside", [(), (prompt_row(3, 1),)], ids=["recorded", "staged"])
async def test_an_error_ends_the_executor_and_every_step(beside: tuple[Row, ...], kernels: LoadedModel) -> None:
    executor = OverlappedExecutor(graph_runner(kernels, 4))
    first = executor.forward(Batch(step=0, rows=(prompt_row(1, 2),)))
    executor.sample(first)
    bad = executor.forward(Batch(step=1, rows=(decode_row(7, 3), *beside)))
    executor.sample(bad)
    assert len((await executor.collect(first)).rows) == 1
    with pytest.raises(EngineDied, match="the step before sampled nothing"):
        await executor.collect(bad)
    with pytest.raises(EngineDied):
        executor.forward(Batch(step=2, rows=()))
    executor.close()


async def test_an_error_in_waiting_for_tokens_ends_the_executor(
    kernels: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    executor = OverlappedExecutor(graph_runner(kernels, 4))
    monkeypatch.setattr("pdserve.worker.kernel_sampler.Asked.outputs", broken)
    step = executor.forward(Batch(step=0, rows=(prompt_row(1, 2),)))
    executor.sample(step)
    with pytest.raises(EngineDied, match="an illegal memory access"):
        await executor.collect(step)
    assert (await asyncio.wrap_future(executor.death)).__cause__
    executor.close()


async def test_close_finishes_what_was_submitted(kernels: LoadedModel) -> None:
    executor = OverlappedExecutor(graph_runner(kernels, 4))
    step = executor.forward(Batch(step=0, rows=(prompt_row(1, 2),)))
    executor.sample(step)
    executor.close()
    assert len((await executor.collect(step)).rows) == 1
    with pytest.raises(EngineDied, match="the executor was closed"):
        executor.forward(Batch(step=1, rows=()))


@pytest.mark.parametrize("lengths", [(3,), pytest.param((2, 40, 19), marks=pytest.mark.slow)])
def test_deterministic_steps_are_recorded_too(
    lengths: tuple[int, ...], checkpoint: Path, replayed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have the bits of the staged ones."""
    loaded = load_model(checkpoint, kernels=True, deterministic=True)
    rows = [
        prompt_row(i, 0, num_tokens=n, token_ids=tuple(range(n)), block_ids=tuple(range(4 * i, 4 * i + 3)))
        for i, n in enumerate(lengths)
    ]
    logits = []
    for recorded in (True, False):
        runner = graph_runner(loaded, 12, deterministic=True)
        if not recorded:
            monkeypatch.setattr(runner, "_bucket", lambda rows: None)
        prompts = Batch(step=0, rows=tuple(rows))
        runner.sample(prompts, runner.forward(prompts))
        late = tuple(decode_row(i, 0, n)._replace(block_ids=rows[i].block_ids) for i, n in enumerate(lengths))
        logits.append(runner.forward(Batch(step=1, rows=late)).clone())
    assert torch.equal(*logits)
    assert sum(replayed[f"bucket {size}"] for size in BUCKETS) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(1, 7))
async def test_tokens_are_those_of_torch_in_any_schedule(
    seed: int, kernels: LoadedModel, in_torch: LoadedModel
) -> None:
    await check(
        seed,
        kernels,
        in_torch,
        requests=9,
        num_blocks=Random(seed).choice([5, 6, 64]),
        prompts=[1, 15, 16, 17, 33],
        answers=[4, 9, 14],
    )
