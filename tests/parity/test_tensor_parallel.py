"""A model divided among ranks gives transformers' logits, one choice of tokens, and the same bits in any batch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.model.loader import load_model
from pdserve.model.parallel import ParallelContext
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import make_checkpoint
from tests.parity.test_transformers import NUM_TOKENS, prompt, reference_logits
from tests.ranks import on_ranks
from tests.stepping import Stepped, Stepper

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "llama": (2, "llama", {}),
    "llama, all biases": (2, "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head for two ranks": (2, "llama", {"num_key_value_heads": 1}),
    "llama, two key heads for four ranks": (4, "llama", {}),
    "qwen2, tied head": (2, "qwen2", {"tie": True}),
    "qwen3": (2, "qwen3", {}),
    "qwen3, six heads for three ranks": (
        3,
        "qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    ),
    "mistral, sharded files": (2, "mistral", {"sharded": True}),
}
LENGTHS = (1, 40, 150)


def run(path: Path, ranks: ParallelContext, *, chunk: int = 40) -> Stepped:
    """150 prompt tokens in chunks, then NUM_TOKENS greedy ones."""
    stepper = Stepper(load_model(path, parallel=ranks), WorkerOptions(num_blocks=80, block_size=8))
    sequence = stepper.sequence(prompt(150))
    stepper.generate(sequence, NUM_TOKENS, chunk=chunk)
    return sequence


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_give_transformers_logits_and_tokens(case: str, tmp_path: Path) -> None:
    world_size, family, overrides = CASES[case]
    path = make_checkpoint(tmp_path, family, **overrides)
    leader, *others = on_ranks(world_size, lambda ranks: run(path, ranks))
    reference = reference_logits(path, leader.tokens)
    assert leader.tokens[-NUM_TOKENS:] == reference.argmax(-1).tolist()
    torch.testing.assert_close(torch.stack(leader.logits), reference, atol=1e-4, rtol=0)
    for other in others:
        assert other.tokens == leader.tokens


def test_dividing_a_model_changes_the_last_bits_only(tmp_path: Path) -> None:
    """Sums over ranks round in another order than one long sum: equal tokens, not equal bits."""
    path = make_checkpoint(tmp_path, "qwen3")
    whole, divided = (on_ranks(size, lambda ranks: run(path, ranks))[0] for size in (1, 2))
    assert divided.tokens == whole.tokens
    differences = torch.stack(divided.logits) - torch.stack(whole.logits)
    assert 0 < differences.abs().max() < 1e-4


@pytest.fixture(scope="module")
def twelve_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, Any] = {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "num_hidden_layers": 1,
    }
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", **shape)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@settings(max_examples=5, deadline=None)
@given(
    plan=st.lists(
        st.dictionaries(st.integers(0, len(LENGTHS) - 1), st.sampled_from([1, 7, 16, 33]), min_size=1), max_size=6
    )
)
def test_batch_and_chunks_change_no_bit(world_size: int, twelve_heads: Path, plan: list[dict[int, int]]) -> None:
    alone, together = (on_ranks(world_size, partial(first_logits, twelve_heads, steps))[0] for steps in ([], plan))
    for length, expected, found in zip(LENGTHS, alone, together, strict=True):
        assert torch.equal(found, expected), f"logits after {length} tokens differ"


def first_logits(path: Path, plan: list[dict[int, int]], ranks: ParallelContext) -> list[torch.Tensor]:
    """First logits of each prompt, on rank 0. A step of the plan says by prompt how many tokens it computes; what is
    left after all steps is computed prompt by prompt."""
    stepper = Stepper(load_model(path, parallel=ranks), WorkerOptions(num_blocks=80, block_size=8))
    sequences = {length: stepper.sequence(prompt(length, seed=length)) for length in LENGTHS}
    for step in plan:
        left = {LENGTHS[i]: min(chunk, LENGTHS[i] - sequences[LENGTHS[i]].computed) for i, chunk in step.items()}
        if parts := [(sequences[length], count) for length, count in left.items() if count > 0]:
            stepper.step(*parts)
    for length, sequence in sequences.items():
        if sequence.computed < length:
            stepper.generate(sequence, 1)
    return [sequence.logits[0] for sequence in sequences.values() if ranks.rank == 0]
