"""CUDA graphs: the tokens of the same steps replayed eagerly and of torch on the CPU, and nobody waits."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pdserve.core.batch import Batch, SamplerInit
from pdserve.core.endpoint import EngineLimits
from pdserve.model.loader import LoadedModel, load_model
from tests.checkpoints import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 341
LIMITS = EngineLimits(max_tokens_per_step=40, max_rows=6, chunk_size=16, max_model_len=128, prefix_caching=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=VOCAB, max_position_embeddings=128)


@pytest.fixture(scope="module", params=[False, True], ids=["balanced", "deterministic"])
def fixed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, fixed: bool) -> LoadedModel:
    return load_model(checkpoint, dtype="float32", device="cuda", deterministic=fixed)


@contextmanager
def nobody_waits() -> Iterator[None]:
    """torch refuses whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", range(6))
def test_recorded_steps_give_the_tokens_of_torch_in_any_schedule(
    seed: int, loaded: LoadedModel, fixed: bool, checkpoint: Path
) -> None:
    from pdserve.worker.overlapped import OverlappedExecutor
    from tests.unit.worker.test_graph_runner import expected, generate, graph_runner, schedule

    arrivals = schedule(seed, 9, [1, 15, 16, 17, 33], [4, 9, 14])
    executor = OverlappedExecutor(graph_runner(loaded, 6, deterministic=fixed))
    tokens = asyncio.run(generate(executor, loaded, 6, LIMITS, arrivals))
    executor.close()
    in_torch = load_model(checkpoint, kernels=False, deterministic=True)
    assert tokens == asyncio.run(expected(in_torch, arrivals))


def test_a_replay_has_the_bits_of_the_work_itself(loaded: LoadedModel, fixed: bool) -> None:
    from pdserve.worker.graphs import Eager
    from tests.unit.worker.test_graph_runner import decode_row, graph_runner, prompt_row

    logits = []
    for graphs in (None, Eager()):
        runner = graph_runner(loaded, 4, deterministic=fixed, graphs=graphs)
        for step, rows in enumerate(((prompt_row(1, 2), prompt_row(2, 3)), (decode_row(1, 2), decode_row(2, 3)))):
            batch = Batch(step=step, rows=rows)
            last = runner.forward(batch).clone()
            runner.sample(batch, last)
        logits.append(last)
    assert torch.equal(*logits)


def test_steps_are_submitted_without_waiting_for_the_device(loaded: LoadedModel, fixed: bool) -> None:
    """Of either kind: a prompt, whose history a penalty looks at, beside a decoding sequence, and recorded ones."""
    from tests.unit.worker.test_graph_runner import decode_row, graph_runner, prompt_row

    runner = graph_runner(loaded, 4, deterministic=fixed)
    penalised = SamplerInit(repetition_penalty=1.2, prompt_len=3, seen_token_ids=(5, 6, 7))
    steps = (
        (prompt_row(1, 2),),
        (decode_row(1, 2), prompt_row(2, 3, sampler=penalised)),
        (decode_row(1, 2, 4), decode_row(2, 3)),
        (decode_row(1, 2, 5), decode_row(2, 3, 4)),
    )
    outputs = []
    with nobody_waits():
        for step, rows in enumerate(steps):
            batch = Batch(step=step, rows=rows)
            outputs.append(runner.begin_sample(batch, runner.forward(batch)))
    assert [len(output().rows) for output in outputs] == [1, 2, 2, 2]
