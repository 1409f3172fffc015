"""In deterministic mode a sequence's logits are the same bits whatever happens around it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.layout import KVOrder
from pdserve.model.loader import DTYPES, LoadedModel, load_model
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import make_checkpoint
from tests.parity.test_transformers import prompt
from tests.stepping import Stepped, Stepper

PROMPT_LENS = (1, 40, 150, 600)
NUM_TOKENS = 8
Load = Callable[[str, str], LoadedModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loaded models by (family, dtype); qwen3 has sizes that fill no vector register."""
    directory: Path = tmp_path_factory.mktemp("models")
    make_checkpoint(directory / "llama", "llama")
    make_checkpoint(directory / "qwen2", "qwen2", tie=True)
    odd: dict[str, Any] = {
        "hidden_size": 88,
        "intermediate_size": 100,
        "num_attention_heads": 6,
        "head_dim": 24,
        "vocab_size": 301,
    }
    make_checkpoint(directory / "qwen3", "qwen3", **odd)
    return cache(lambda family, dtype: load_model(directory / family, dtype=dtype, deterministic=True))


def stepper(loaded: LoadedModel, block_size: int = 16, order: KVOrder = KVOrder.BLOCK_MAJOR, seed: int = 0) -> Stepper:
    """Memory starts as NaN: nothing that was not written for a sequence may reach its results."""
    options = WorkerOptions(num_blocks=1600 // block_size, block_size=block_size, order=order)
    built = Stepper(loaded, options, seed=seed)
    built.kv.memory.view(loaded.dtype).fill_(float("nan"))
    return built


@cache
def alone(loaded: LoadedModel, length: int) -> Stepped:
    """The reference: a sequence run by itself, its prompt in one piece."""
    runner = stepper(loaded)
    sequence = runner.sequence(prompt(length, seed=length))
    runner.generate(sequence, NUM_TOKENS)
    assert all(logits.isfinite().all() for logits in sequence.logits)
    return sequence


def assert_same_bits(sequence: Stepped, reference: Stepped) -> None:
    assert sequence.tokens == reference.tokens
    for index, (logits, expected) in enumerate(zip(sequence.logits, reference.logits, strict=True)):
        assert torch.equal(logits, expected), f"logits of output token {index} differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_batch_chunks_and_blocks_change_no_bit(load: Load, family: str, dtype: str, data: st.DataObject) -> None:
    loaded = load(family, dtype)
    block_size = data.draw(st.sampled_from([4, 8, 16, 24, 32, 64]))
    runner = stepper(loaded, block_size, data.draw(st.sampled_from(list(KVOrder))), seed=data.draw(st.integers(0, 9)))
    sequences = {length: runner.sequence(prompt(length, seed=length)) for length in PROMPT_LENS}
    while live := [s for s in sequences.values() if len(s.logits) < NUM_TOKENS]:
        chosen = data.draw(st.permutations(live).flatmap(lambda p: st.integers(1, len(p)).map(lambda n: p[:n])))
        chunk = data.draw(st.sampled_from([1, 7, 16, 33, 100, 256]))
        runner.step(*((s, min(max(chunk, s.computed // 8), len(s.tokens) - s.computed)) for s in chosen))
    for length, sequence in sequences.items():
        assert_same_bits(sequence, alone(loaded, length))


@pytest.mark.parametrize("shared", [16, 304, 592], ids=["little", "half", "all but the last block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefix_hit_changes_no_bit(load: Load, dtype: str, shared: int) -> None:
    loaded = load("llama", dtype)
    runner = stepper(loaded)
    first = runner.sequence(prompt(600, seed=600))
    runner.generate(first, 3, chunk=50)
    second = runner.sequence(prompt(600, seed=600), prefix=first, shared=shared)
    runner.generate(second, NUM_TOKENS)
    assert_same_bits(second, alone(loaded, 600))


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_only_the_last_token_changes_no_bit(load: Load, dtype: str) -> None:
    """A hit over the whole prompt: the last token is computed a second time, into the shared block."""
    loaded = load("llama", dtype)
    runner = stepper(loaded)
    first = runner.sequence(prompt(40, seed=40))
    runner.generate(first, 1)
    second = runner.sequence(prompt(40, seed=40))
    second.block_ids, second.computed = list(first.block_ids), 39
    runner.generate(second, NUM_TOKENS)
    assert_same_bits(second, alone(loaded, 40))


def test_without_deterministic_mode_chunking_shows(tmp_path: Path) -> None:
    """The equalities above are the mode's doing: the same comparison fails without it."""
    loaded = load_model(make_checkpoint(tmp_path, "llama"), deterministic=False)
    options = WorkerOptions(num_blocks=100, deterministic=False)
    whole, pieces = (Stepper(loaded, options) for _ in range(2))
    first, second = (runner.sequence(prompt(150)) for runner in (whole, pieces))
    whole.generate(first, NUM_TOKENS)
    pieces.generate(second, NUM_TOKENS, chunk=7)
    assert first.tokens == second.tokens
    with pytest.raises(AssertionError, match="logits of output token 0 differ"):
        assert_same_bits(second, first)
