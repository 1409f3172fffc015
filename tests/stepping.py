"""Drives a Runner step by step with batches made by hand, so that a test decides chunks, batches and blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

import torch
from torch import Tensor

from pdserve.attention.base import AttentionBackend
from pdserve.core.batch import Batch, Row, SamplerInit
from pdserve.model.loader import LoadedModel
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.runner import Runner
from pdserve.worker.worker import WorkerOptions, attention_backend, kv_layout, kv_shard

GREEDY = SamplerInit(temperature=0.0)


@dataclass(eq=False)
class Stepped:
    """A sequence under test: all tokens so far, how many of them have KV, and its block table."""

    id: int
    tokens: list[int]
    block_ids: list[int]
    computed: int = 0
    settings: SamplerInit = GREEDY
    logits: list[Tensor] = field(default_factory=list)
    """The logits rows its sampled tokens came from; on ranks other than 0 none."""


class Stepper:
    """A runner with its own KV memory. Blocks are handed out in an order shuffled by seed; attention is the worker's
    unless another is given."""

    def __init__(
        self, loaded: LoadedModel, options: WorkerOptions, *, seed: int = 0, attention: AttentionBackend | None = None
    ) -> None:
        self.layout = kv_layout(loaded, options)
        self.kv = KVTensors(self.layout.of_heads(kv_shard(loaded).heads), device=loaded.device)
        if attention is None:
            attention = attention_backend(loaded, self.layout.block_size, options.deterministic is not False)
        self.runner = Runner(loaded, attention, self.kv)
        self._leads = loaded.parallel.rank == 0
        self._free = Random(seed).sample(range(self.layout.num_blocks), self.layout.num_blocks)
        self._ids = count()
        self._steps = count()

    def sequence(self, tokens: Sequence[int], *, prefix: Stepped | None = None, shared: int = 0) -> Stepped:
        """A new sequence; with prefix, its first shared tokens (whole blocks) reuse that sequence's KV."""
        block_size = self.layout.block_size
        assert shared % block_size == 0
        blocks = prefix.block_ids[: shared // block_size] if prefix else []
        return Stepped(next(self._ids), list(tokens), list(blocks), computed=shared)

    def step(self, *parts: tuple[Stepped, int]) -> None:
        """Compute the next n tokens of each (sequence, n); whoever has no token left samples one."""
        rows = tuple(self._row(sequence, n) for sequence, n in parts)
        batch = Batch(step=next(self._steps), rows=rows)
        logits = self.runner.forward(batch)
        by_id = {sequence.id: sequence for sequence, _ in parts}
        outputs = self.runner.sample(batch, logits).rows
        for output in outputs:
            by_id[output.sequence_id].tokens.extend(output.token_ids)
        for output, row in zip(outputs, logits, strict=self._leads):
            by_id[output.sequence_id].logits.append(row)

    def generate(self, sequence: Stepped, num_tokens: int, *, chunk: int = 1 << 30) -> list[int]:
        """Run one sequence alone until it has sampled num_tokens more; returns them."""
        wanted = len(sequence.tokens) + num_tokens
        while len(sequence.tokens) < wanted:
            self.step((sequence, min(chunk, len(sequence.tokens) - sequence.computed)))
        return sequence.tokens[wanted - num_tokens :]

    def _row(self, sequence: Stepped, num_tokens: int) -> Row:
        start, end = sequence.computed, sequence.computed + num_tokens
        while len(sequence.block_ids) * self.layout.block_size < end:
            sequence.block_ids.append(self._free.pop())
        sequence.computed = end
        sample = end == len(sequence.tokens)
        return Row(
            sequence_id=sequence.id,
            start=start,
            num_tokens=num_tokens,
            token_ids=tuple(sequence.tokens[start:end]),
            block_ids=tuple(sequence.block_ids),
            sample=sample,
            sampler=sequence.settings if sample and not sequence.logits else None,
        )


def single_thread() -> None:
    """The setting a worker's thread has; batch invariance is promised for it."""
    torch.set_num_threads(1)
