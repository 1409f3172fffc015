"""Logits and greedy tokens equal those of transformers for every family and option."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pdserve.core.layout import KVOrder
from pdserve.model.loader import load_model
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import LLAMA3_ROPE, VOCAB_SIZE, make_checkpoint
from tests.stepping import Stepped, Stepper

NUM_TOKENS = 20
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie": True}),
    "llama, sharded files": ("llama", {"sharded": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, as many key heads as heads": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied head": ("qwen2", {"tie": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied head, wide heads": ("qwen3", {"tie": True, "head_dim": 32}),
    "mistral": ("mistral", {}),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(VOCAB_SIZE, (length,), generator=generator)]


def reference_logits(path: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' logits of the positions that produced the last NUM_TOKENS tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens[:-1]])).logits[0, -NUM_TOKENS:]
    return logits


def run(
    path: Path, *, dtype: str = "float32", order: KVOrder = KVOrder.BLOCK_MAJOR, wrong_block: bool = False
) -> Stepped:
    """150 prompt tokens in chunks of 40, then NUM_TOKENS greedy ones.

    wrong_block: after the prompt, one of its 19 blocks is taken from another sequence.
    """
    loaded = load_model(path, dtype=dtype)
    stepper = Stepper(loaded, WorkerOptions(num_blocks=80, block_size=8, order=order))
    sequence = stepper.sequence(prompt(150))
    stepper.generate(sequence, 1, chunk=40)
    if wrong_block:
        other = stepper.sequence(prompt(150, seed=1))
        stepper.generate(other, 1)
        sequence.block_ids[3] = other.block_ids[3]
    stepper.generate(sequence, NUM_TOKENS - 1)
    return sequence


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_and_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    sequence = run(make_checkpoint(tmp_path, family, **overrides))
    reference = reference_logits(tmp_path, sequence.tokens)
    assert sequence.tokens[-NUM_TOKENS:] == reference.argmax(-1).tolist()
    torch.testing.assert_close(torch.stack(sequence.logits), reference, atol=1e-4, rtol=0)


def test_layer_major_memory_gives_the_same_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    block_major, layer_major = (run(tmp_path, order=order) for order in KVOrder)
    assert block_major.tokens == layer_major.tokens
    assert all(map(torch.equal, block_major.logits, layer_major.logits))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_one_wrong_kv_block_breaks_parity(family: str, tmp_path: Path) -> None:
    sequence = run(make_checkpoint(tmp_path, family), wrong_block=True)
    reference = reference_logits(tmp_path, sequence.tokens)
    assert sequence.tokens[-NUM_TOKENS:] != reference.argmax(-1).tolist()
    assert (torch.stack(sequence.logits)[1:] - reference[1:]).abs().max() > 1e-2


def test_the_checkpoints_own_rope_scaling_matters(tmp_path: Path) -> None:
    """Else the llama3 case above could not tell scaled from unscaled frequencies."""
    plain = run(make_checkpoint(tmp_path / "plain", "llama"))
    scaled = run(make_checkpoint(tmp_path / "scaled", "llama", rope_parameters=LLAMA3_ROPE))
    assert (plain.logits[0] - scaled.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_bfloat16_is_close_to_float32(family: str, tmp_path: Path) -> None:
    """The yardstick is how far transformers' own bfloat16 is from float32."""
    sequence = run(make_checkpoint(tmp_path, family), dtype="bfloat16")
    exact = reference_logits(tmp_path, sequence.tokens)
    usual = (reference_logits(tmp_path, sequence.tokens, torch.bfloat16) - exact).square().mean().sqrt()
    ours = (torch.stack(sequence.logits) - exact).square().mean().sqrt()
    assert 1e-4 < ours < 1.2 * usual
