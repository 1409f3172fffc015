"""The model in kernels against the same model in torch's operations; on CPU, in Triton's interpreter."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.core.layout import KVOrder
from pdserve.model.loader import LoadedModel, load_model
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import FAMILIES, LLAMA3_ROPE, make_checkpoint
from tests.parity.test_transformers import prompt
from tests.stepping import Stepped, Stepper

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton, which CUDA builds of torch bring along")

Load = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    directory = tmp_path_factory.mktemp("models")

    @cache
    def checkpoint(family: str) -> Path:
        scaled: dict[str, Any] = {"rope_parameters": LLAMA3_ROPE} if family == "llama" else {}
        return make_checkpoint(directory / family, family, vocab_size=341, **scaled)

    return lambda family, **options: load_model(checkpoint(family), **options)


def run(
    loaded: LoadedModel, *, chunk: int = 100, crowd: int = 0, order: KVOrder = KVOrder.BLOCK_MAJOR, tokens: int = 3
) -> Stepped:
    """A prompt of 37 tokens in chunks, then `tokens` greedy ones, among `crowd` other sequences."""
    options = WorkerOptions(num_blocks=32, block_size=16, order=order, deterministic=True)
    stepper = Stepper(loaded, options)
    stepper.kv.memory.view(loaded.dtype).fill_(float("nan"))
    others = [stepper.sequence(prompt(5 + i, seed=1 + i)) for i in range(crowd)]
    for other in others:
        stepper.generate(other, 1)
    sequence = stepper.sequence(prompt(37))
    stepper.generate(sequence, 1, chunk=chunk)
    for _ in range(tokens - 1):
        stepper.step((sequence, 1), *((other, 1) for other in others))
    return sequence


QUICK = {"llama": KVOrder.BLOCK_MAJOR, "qwen3": KVOrder.LAYER_MAJOR}
"""Llama 3's rotary scaling; norms of queries and keys."""


def assert_equals_torch(loaded: LoadedModel, in_torch: LoadedModel, order: KVOrder, *, tokens: int) -> None:
    sequence, expected = run(loaded, order=order, tokens=tokens), run(in_torch, tokens=tokens)
    assert sequence.tokens == expected.tokens
    torch.testing.assert_close(torch.stack(sequence.logits), torch.stack(expected.logits), atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", QUICK)
def test_kernels_compute_what_torch_does(family: str, load: Load) -> None:
    assert_equals_torch(load(family, kernels=True, deterministic=False), load(family), QUICK[family], tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("order", KVOrder)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_torch_does_in_every_family(family: str, order: KVOrder, load: Load) -> None:
    assert_equals_torch(load(family, kernels=True, deterministic=False), load(family), order, tokens=6)


def test_many_rows_go_through_kernels_of_their_own(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.model.kernel_ops.FEW_ROWS", 0)
    loaded = load("qwen2", kernels=True, deterministic=False)
    assert_equals_torch(loaded, load("qwen2"), KVOrder.BLOCK_MAJOR, tokens=2)


@pytest.mark.usefixtures("one_order_of_sums")
def test_deterministic_kernels_give_the_same_bits_in_any_batch_chunking_and_memory_order(load: Load) -> None:
    loaded = load("qwen3", kernels=True, deterministic=True)
    alone = run(loaded, tokens=2)
    crowded = run(loaded, tokens=2, chunk=21, crowd=1, order=KVOrder.LAYER_MAJOR)
    assert crowded.tokens == alone.tokens
    assert all(map(torch.equal, crowded.logits, alone.logits))


def test_kernels_are_chosen_once_by_device(load: Load) -> None:
    assert not load("qwen3").kernels
