"""A model whose attention is the Triton kernel, interpreted, alone or with all other kernels as on a GPU: the logits
of torch, and the same bits whatever else runs."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pdserve.core.layout import KVOrder
from pdserve.model.loader import LoadedModel, load_model
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import make_checkpoint
from tests.parity.test_transformers import prompt
from tests.stepping import Stepped, Stepper

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

NUM_TOKENS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="attention"), pytest.param(True, id="all kernels", marks=pytest.mark.slow)],
)
def loaded(request: pytest.FixtureRequest, checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, dtype="float32", deterministic=True, kernels=request.param)


@pytest.fixture(scope="module")
def in_torch(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, dtype="float32", deterministic=True)


def run(
    loaded: LoadedModel,
    *,
    triton: bool = True,
    deterministic: bool = True,
    chunk: int = 45,
    crowd: int = 0,
    order: KVOrder = KVOrder.BLOCK_MAJOR,
) -> Stepped:
    """45 prompt tokens in chunks, then NUM_TOKENS greedy ones, among `crowd` other sequences."""
    from pdserve.attention.triton_backend import TritonAttention

    attention = TritonAttention(
        heads=loaded.config.num_heads,
        kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
        block_size=16,
        dtype=loaded.dtype,
        device=loaded.device,
        deterministic=deterministic,
    )
    stepper = Stepper(loaded, WorkerOptions(num_blocks=64, order=order), attention=attention if triton else None)
    stepper.kv.memory.view(loaded.dtype).fill_(float("nan"))
    others = [stepper.sequence(prompt(20 + i, seed=1 + i)) for i in range(crowd)]
    for other in others:
        stepper.generate(other, 1)
    sequence = stepper.sequence(prompt(45))
    stepper.generate(sequence, 1, chunk=chunk)
    for _ in range(NUM_TOKENS - 1):
        stepper.step((sequence, 1), *((other, 1) for other in others))
    return sequence


def test_logits_equal_those_of_torch(loaded: LoadedModel, in_torch: LoadedModel) -> None:
    expected = run(in_torch, triton=False)
    sequence = run(loaded, deterministic=False, crowd=2, chunk=30)
    assert sequence.tokens == expected.tokens
    torch.testing.assert_close(torch.stack(sequence.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("one_order_of_sums")
def test_deterministic_gives_the_same_bits_in_any_batch_chunking_and_memory_order(loaded: LoadedModel) -> None:
    alone = run(loaded)
    crowded = run(loaded, chunk=7, crowd=2, order=KVOrder.LAYER_MAJOR)
    assert crowded.tokens == alone.tokens
    assert all(map(torch.equal, crowded.logits, alone.logits))
