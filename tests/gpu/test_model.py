"""The model on a GPU: parity with transformers, bit-equality where promised, the same noise as on a CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pdserve.core.layout import KVOrder
from pdserve.model.loader import load_model
from pdserve.worker.worker import WorkerOptions
from tests.checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.stepping import Stepped, Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_TOKENS = 20


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(VOCAB_SIZE, (length,), generator=generator)]


def run(
    path: Path, *, dtype: str = "float32", chunk: int = 40, crowd: int = 0, order: KVOrder = KVOrder.BLOCK_MAJOR
) -> Stepped:
    """150 prompt tokens in chunks, then NUM_TOKENS greedy ones, among `crowd` other sequences."""
    loaded = load_model(path, dtype=dtype, device="cuda", deterministic=True)
    options = WorkerOptions(num_blocks=256, block_size=16, device="cuda", order=order, deterministic=True)
    stepper = Stepper(loaded, options)
    others = [stepper.sequence(prompt(30 + i, seed=1 + i)) for i in range(crowd)]
    for other in others:
        stepper.generate(other, 1)
    sequence = stepper.sequence(prompt(150))
    stepper.generate(sequence, 1, chunk=chunk)
    for _ in range(NUM_TOKENS - 1):
        stepper.step((sequence, 1), *((other, 1) for other in others))
    return sequence


def reference_logits(path: Path, tokens: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens[:-1]], device="cuda")).logits[0, -NUM_TOKENS:]
    return logits


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    sequence = run(tmp_path)
    reference = reference_logits(tmp_path, sequence.tokens)
    assert sequence.tokens[-NUM_TOKENS:] == reference.argmax(-1).tolist()
    torch.testing.assert_close(torch.stack(sequence.logits), reference, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_gives_the_same_bits_in_any_batch_chunking_and_memory_order(
    dtype: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "qwen3")
    alone = run(tmp_path, dtype=dtype, chunk=150)
    crowded = run(tmp_path, dtype=dtype, chunk=7, crowd=9, order=KVOrder.LAYER_MAJOR)
    assert crowded.tokens == alone.tokens
    assert all(map(torch.equal, crowded.logits, alone.logits))
