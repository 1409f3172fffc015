"""Decode steps, recorded once per bucket: from the rows on the device to their next tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.attention.base import DecodeMetadata
from pdserve.attention.triton_backend import TritonAttention, TritonPlan
from pdserve.model.loader import LoadedModel
from pdserve.worker.device_rows import DeviceRows
from pdserve.worker.graphs import Recorder
from pdserve.worker.kv_tensors import KVTensors
from pdserve_kernels.decode_rows.columns import TABLE
from pdserve_kernels.decode_rows.kernel import DecodeInputs, advance, decode_inputs
from pdserve_kernels.sampling.kernel import sample

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Rows of the recorded steps. A step takes the smallest that holds it; from 16 on, at most half of it is padding, and
most often less than a fifth. The last is the largest whose products the kernels compute (kernel_ops.FEW_ROWS)."""


def bucket_of(rows: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds so many rows; None when none does."""
    return next((bucket for bucket in buckets if rows <= bucket), None)


@dataclass(slots=True)
class _Recorded:
    """A bucket's two replays, and what the forward pass left for sampling."""

    forward: Callable[[], tuple[DecodeInputs, TritonPlan]]
    sample: Callable[[], Tensor]


class DecodeGraphs:
    """The steps `rows` makes the inputs of, for each of the buckets (ascending)."""

    def __init__(
        self,
        loaded: LoadedModel,
        attention: TritonAttention,
        kv: KVTensors,
        rows: DeviceRows,
        recorder: Recorder,
        buckets: tuple[int, ...],
    ) -> None:
        assert loaded.model.head is not None
        self._model, self._head = loaded.model, loaded.model.head
        self._attention = attention
        self._kv = kv
        self._rows = rows
        self._recorder = recorder
        self._buckets = buckets
        # One for all buckets: in a large one, logits are most of what a step needs.
        self._logits = torch.empty(buckets[-1], loaded.config.vocab_size, dtype=loaded.dtype, device=loaded.device)
        self._made: dict[int, tuple[DecodeInputs, TritonPlan]] = {}
        self._recorded: dict[int, _Recorded] = {}

    def record(self) -> None:
        """Record every bucket, the largest first: the others find room in its memory. No row takes part."""
        self._rows.clear_order()
        for size in reversed(self._buckets):
            forward = self._recorder.record(lambda size=size: self._forward(size))  # type: ignore[misc]
            self._made[size] = forward()
            choose = self._recorder.record(lambda size=size: self._choose(size))  # type: ignore[misc]
            self._recorded[size] = _Recorded(forward, choose)

    def forward(self, size: int) -> Tensor:
        """Write the KV of the step's rows; logits (size, vocab) of the model's dtype, until the next forward."""
        self._made[size] = self._recorded[size].forward()
        return self._logits[:size]

    def sample(self, size: int) -> Tensor:
        """Choose the tokens of the step just computed, whose rows are all plain, and count the rows on: what `advance`
        returns."""
        return self._recorded[size].sample()

    def _forward(self, size: int) -> tuple[DecodeInputs, TritonPlan]:
        """What sampling reads, and what must live as long as the graph."""
        table = self._rows.table
        inputs = decode_inputs(table, self._rows.order[:size], self._kv.layout.block_size)
        metadata = DecodeMetadata(
            block_tables=table[:, TABLE:],
            table_rows=inputs.table_rows,
            kv_lens=inputs.kv_lens,
            slots=inputs.slots,
        )
        plan = self._attention.plan_decode(metadata)
        hidden = self._model(inputs.tokens, inputs.positions, plan, self._kv.layers)
        self._logits[:size].copy_(self._head(hidden))
        return inputs, plan

    def _choose(self, size: int) -> Tensor:
        inputs, _ = self._made[size]
        logits = self._logits[:size]
        tokens, logprobs = sample(logits, inputs.knobs, inputs.controls)
        order = self._rows.order[:size]
        return advance(self._rows.table, order, tokens, logprobs, logits.amax(dim=1), moves=True)
