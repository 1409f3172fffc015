"""Computes steps: a batch's forward pass, then the choice of its tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pdserve.attention.base import AttentionBackend
from pdserve.core.batch import Batch, Row, RowOutput, StepOutput
from pdserve.model.loader import LoadedModel
from pdserve.worker.inputs import InputBuilder
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.sampler import NO_TOKEN, Sampler, row_output

if TYPE_CHECKING:
    from pdserve.worker.kernel_sampler import KernelSampler

BatchLayersDone = Callable[[Batch, int, int], None]
"""Called as (batch, first, end) on the thread that computes, once layers [first, end) have written the batch's KV. On a
GPU they have it once all is done that the thread's current stream holds by then."""


class Runner:
    """One rank's computation. forward and sample of a step alternate, step by step, on one thread, in torch's inference
    mode.

    All ranks run the same batches. Rank 0 alone has logits, chooses the tokens and tells the others: were each to
    choose by itself, ranks whose processors round differently would go separate ways.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        attention: AttentionBackend,
        kv: KVTensors,
        on_layers_done: BatchLayersDone | None = None,
    ) -> None:
        self._model = loaded.model
        self._parallel = loaded.parallel
        self._device = loaded.device
        self._attention = attention
        self._kv = kv
        self._inputs = InputBuilder(block_size=kv.layout.block_size, device=loaded.device)
        self._sampler = _sampler(loaded)
        self._previous: dict[int, int] = {}
        self._on_layers_done = on_layers_done

    def forward(self, batch: Batch) -> Tensor:
        """Write the KV of all rows; return float32 logits (sampled rows, vocab), on ranks other than 0 none."""
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)  # kernels are launched on the current device of the thread
        self._sampler.drop(batch.released)
        if not batch.rows:
            return torch.empty(0, self._model.config.vocab_size, device=self._device)
        inputs = self._inputs.build(batch, self._previous)
        hidden = self._model(
            inputs.token_ids,
            inputs.positions,
            self._attention.plan(inputs.attention),
            self._kv.layers,
            partial(self._on_layers_done, batch) if self._on_layers_done else None,
        )
        if self._parallel.rank > 0:
            return torch.empty(0, device=self._device)
        return self._model.logits(hidden if inputs.sampled is None else hidden[inputs.sampled])

    def sample(self, batch: Batch, logits: Tensor, masks: Sequence[bytes | None] | None = None) -> StepOutput:
        """Choose a token for every sampled row of a batch whose forward pass gave logits.

        On return the batch's KV is final, also on a GPU: whoever reads it next may do so in another stream."""
        rows: list[Row] = [row for row in batch.rows if row.sample]
        if not rows and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        outputs = self._choose(rows, logits, masks) if rows else []
        # A sequence without a token ends; a step of it that is submitted already computes with any.
        self._previous = {output.sequence_id: (output.token_ids or (0,))[-1] for output in outputs}
        return StepOutput(step=batch.step, rows=tuple(outputs))

    def _choose(self, rows: Sequence[Row], logits: Tensor, masks: Sequence[bytes | None] | None) -> list[RowOutput]:
        if self._parallel.rank > 0:
            chosen = self._parallel.broadcast(torch.empty(len(rows), dtype=torch.int64, device=self._device))
            return [row_output(row, token) for row, token in zip(rows, chosen.tolist(), strict=True)]
        outputs = self._sampler.sample(logits, rows, masks)
        tokens = [(output.token_ids or (NO_TOKEN,))[0] for output in outputs]
        self._parallel.broadcast(torch.tensor(tokens, dtype=torch.int64, device=self._device))
        return outputs


def _sampler(loaded: LoadedModel) -> "Sampler | KernelSampler":
    if not loaded.kernels:
        return Sampler(loaded.config.vocab_size, loaded.device)
    from pdserve.worker.kernel_sampler import KernelSampler

    return KernelSampler(loaded.config.vocab_size, loaded.device)
