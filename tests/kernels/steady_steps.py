"""Prints as JSON which kernels a worker compiles while it serves, after all that it did before its first step.

A program of its own: where tests run, kernels are decorated for the interpreter. Here they are specialised as on a
Hopper GPU, by types, alignments and constants, but neither compiled nor launched: every result is zero.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pdserve.attention import triton_backend
from pdserve.core.batch import Batch, Row, SamplerInit, TokenSource
from pdserve.model.loader import load_model
from pdserve.worker.graph_runner import GraphRunner
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.worker import WorkerOptions, kv_layout
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

MULTIPROCESSORS = 132
BLOCK_SIZE = 16
LENGTHS = (1, 3, 15, 16, 17, 100, 299, 512)


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Specialisations:
    """Names of the kernels asked for that were not there yet."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()
        self._new: list[str] = []

    def hook(self, *, key: Any, fn: Any, **_: Any) -> bool:
        if (fn.name, str(key)) not in self._known:
            self._known.add((fn.name, str(key)))
            self._new.append(fn.name)
        return True  # not to be compiled, and so not launched

    def new(self) -> list[str]:
        new, self._new = self._new, []
        return new


def steps(rng: Random, blocks: int) -> Iterator[tuple[Row, ...]]:
    """Decoding sequences, up to more than the largest bucket holds; prompts that come alone and beside them; penalties,
    banned tokens."""
    lengths: dict[int, int] = {}

    def table(tokens: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(blocks), k=-(-tokens // BLOCK_SIZE)))

    for number in range(60):
        rows = [
            Row(
                sequence_id=sequence,
                start=length,
                num_tokens=1,
                token_ids=(),
                block_ids=table(length + 1),
                token_source=TokenSource.PREVIOUS_STEP,
                sample=True,
            )
            for sequence, length in lengths.items()
        ]
        lengths = {sequence: length + 1 for sequence, length in lengths.items()}
        coming = 250 if number == 50 else rng.choice((0, 1, 1, 2))
        for sequence in range(1000 * number, 1000 * number + coming):
            lengths[sequence] = tokens = 5 if coming == 250 else rng.choice(LENGTHS)
            init = SamplerInit(
                repetition_penalty=rng.choice((1.0, 1.2)),
                min_tokens=rng.choice((0, 4)),
                banned_token_ids=tuple(range(rng.choice((1, 2, 16)))),
                prompt_len=tokens,
                seen_token_ids=(1, 2),
            )
            rows.append(
                Row(
                    sequence_id=sequence,
                    start=0,
                    num_tokens=tokens,
                    token_ids=(0,) * tokens,
                    block_ids=table(tokens),
                    sample=True,
                    sampler=init,
                )
            )
        yield tuple(rows)


def main(folder: Path, deterministic: bool) -> dict[str, Any]:
    asked = Specialisations()
    driver.set_active(Hopper())
    knobs.runtime.jit_cache_hook = asked.hook
    for owner, name, zeros in ((torch, "empty", torch.zeros), (Tensor, "new_empty", Tensor.new_zeros)):
        setattr(owner, name, zeros)  # what no kernel writes must still be tokens
    triton_backend._multiprocessors = lambda device: MULTIPROCESSORS
    make_checkpoint(folder, "qwen3", max_position_embeddings=1024, num_hidden_layers=1)
    loaded = load_model(folder, dtype="bfloat16", kernels=True, deterministic=deterministic)
    layout = kv_layout(loaded, WorkerOptions(num_blocks=1000, block_size=BLOCK_SIZE))
    kv = KVTensors(layout, device=loaded.device)
    attention = triton_backend.TritonAttention(
        heads=loaded.config.num_heads,
        kv_heads=loaded.config.num_kv_heads,
        head_dim=loaded.config.head_dim,
        block_size=BLOCK_SIZE,
        dtype=loaded.dtype,
        device=loaded.device,
        deterministic=deterministic,
    )
    runner = GraphRunner(loaded, attention, kv)
    kv.memory.fill_(1)
    runner.warm_up()
    before = asked.new()
    assert not any(layer[0].any() for layer in kv.layers), "its KV must not stay"
    assert all(layer[1:].all() for layer in kv.layers), "other blocks are none of its business"
    mask = bytes([255]) * -(-VOCAB_SIZE // 8)
    for number, rows in enumerate(steps(Random(0), layout.num_blocks)):
        batch = Batch(step=number, rows=rows)
        masks = [mask] * len(rows) if number % 7 == 3 else None
        runner.sample(batch, runner.forward(batch), masks)
    return {"before": sorted(set(before)), "while_serving": asked.new()}


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), sys.argv[2] == "deterministic"), sys.stdout)
