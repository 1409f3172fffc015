"""Computes steps in kernels with the device ahead of the host: nothing here waits for a step but its output.

A step of one new token for each of its rows is a recorded one (decode_graphs.py), which makes its inputs from rows that
live on the device (device_rows.py). Any other, with a prompt's chunk in it, gets its inputs in one copy. Either way a
token goes from one step to the next on the device, and the host sees it when it comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pdserve.attention.triton_backend import TritonAttention
from pdserve.core.batch import Batch, Row, StepOutput
from pdserve.model.kernel_ops import FEW_ROWS
from pdserve.model.loader import LoadedModel
from pdserve.worker.decode_graphs import BUCKETS, DecodeGraphs, bucket_of
from pdserve.worker.device_rows import DeviceRows
from pdserve.worker.graphs import Recorder, recorder
from pdserve.worker.kernel_sampler import KernelSampler
from pdserve.worker.kv_tensors import KVTensors
from pdserve.worker.runner import BatchLayersDone
from pdserve.worker.staged_inputs import check_supported, stage_inputs
from pdserve.worker.staging import Staging
from pdserve.worker.warm_up import prompt_steps
from pdserve_kernels.decode_rows.kernel import advance


@dataclass(frozen=True, slots=True)
class _Computed:
    """The step whose logits are there: the rows of the table its tokens go to; the bucket of a recorded step, None of
    another; whether sampling can be recorded, too."""

    targets: Tensor
    bucket: int | None = None
    plain: bool = False


class GraphRunner:
    """Runner for a model in kernels on one rank. forward and sample of a step alternate, on one thread and stream.

    Recording happens here, before the first step, and takes as long as the kernels of all buckets take to compile.
    warm_up does the same for the steps that are not recorded.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        attention: TritonAttention,
        kv: KVTensors,
        on_layers_done: BatchLayersDone | None = None,
        *,
        graphs: Recorder | None = None,
        buckets: tuple[int, ...] = BUCKETS,
    ) -> None:
        self._model = loaded.model
        self._device = loaded.device
        self._attention = attention
        self._kv = kv
        self._on_layers_done = on_layers_done
        self._staging = Staging(loaded.device)
        self._sampler = KernelSampler(loaded.config.vocab_size, loaded.device)
        layout = kv.layout
        longest = min(layout.num_blocks, -(-loaded.config.max_positions // layout.block_size))
        self._rows = DeviceRows(max_blocks=longest, max_size=buckets[-1], staging=self._staging)
        self._buckets = buckets
        self._graphs = DecodeGraphs(loaded, attention, kv, self._rows, graphs or recorder(loaded.device), buckets)
        self._computed = self._nothing = _Computed(torch.empty(0, dtype=torch.int64, device=loaded.device))
        self._record()

    def warm_up(self) -> None:
        """Compute steps with prompts in them, before anybody waits for one: where the code of their kernels is not on
        disk yet, it is compiled meanwhile. Their KV goes to block 0, which is left zeroed."""
        told, self._on_layers_done = self._on_layers_done, None
        layout = self._kv.layout
        room = min(self._model.config.max_positions, layout.num_blocks * layout.block_size)
        steps = prompt_steps(more_than=FEW_ROWS, room=room, block_size=layout.block_size)
        for number, rows in enumerate(steps):
            batch = Batch(step=number, rows=rows)
            self.begin_sample(batch, self.forward(batch))
        for layer in self._kv.layers:
            layer[0].zero_()
        last = Batch(step=len(steps), rows=(), released=tuple({row.sequence_id for row in chain(*steps)}))
        self.sample(last, self.forward(last))
        self._on_layers_done = told

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Write the KV of all rows; logits (sampled rows, vocab), until the next step is computed."""
        self._use_device()
        self._sampler.drop(batch.released)
        self._rows.drop(batch.released)
        check_supported(batch.rows)
        if not batch.rows:
            self._computed = self._nothing
            return torch.empty(0, self._model.config.vocab_size, device=self._device)
        if self._rows.make_room(batch.rows):
            self._record()
        bucket = self._bucket(batch.rows)
        if bucket is None:
            return self._forward_staged(batch)
        changes = self._rows.decode(batch.rows, bucket)
        logits = self._graphs.forward(bucket)[: len(batch.rows)]
        self._computed = _Computed(self._rows.order[: len(batch.rows)], bucket, changes.plain)
        if self._on_layers_done:
            self._on_layers_done(batch, 0, len(self._kv.layers))
        return logits

    def sample(self, batch: Batch, logits: Tensor, masks: Sequence[bytes | None] | None = None) -> StepOutput:
        """Choose a token for every sampled row of the batch whose forward pass gave logits, and wait for them.

        On return the batch's KV is final: whoever reads it next may do so in another stream."""
        return self.begin_sample(batch, logits, masks)()

    @torch.inference_mode()
    def begin_sample(
        self, batch: Batch, logits: Tensor, masks: Sequence[bytes | None] | None = None
    ) -> Callable[[], StepOutput]:
        """sample, but for the waiting: that is done by what is returned, on any thread."""
        rows = [row for row in batch.rows if row.sample]
        computed = self._computed
        asked = self._sampler.asked(rows, masks)
        if not rows:
            results = torch.empty(2, 0, dtype=torch.float64, device=self._device)
        elif computed.bucket is not None and computed.plain and not any(mask is not None for mask in asked.masks):
            results = self._graphs.sample(computed.bucket)
        else:
            moves = computed.bucket is not None
            results = advance(self._rows.table, computed.targets, *self._sampler.choose(logits, asked), moves=moves)
        wait = self._staging.to_host(results)
        return lambda: StepOutput(step=batch.step, rows=tuple(asked.outputs(wait())))

    def _forward_staged(self, batch: Batch) -> Tensor:
        inputs, targets = stage_inputs(batch.rows, self._rows, self._staging, self._kv.layout.block_size)
        hidden = self._model(
            inputs.token_ids,
            inputs.positions,
            self._attention.plan(inputs.attention),
            self._kv.layers,
            partial(self._on_layers_done, batch) if self._on_layers_done else None,
        )
        self._computed = _Computed(targets)
        return self._model.logits(hidden if inputs.sampled is None else hidden[inputs.sampled])

    def _bucket(self, rows: Sequence[Row]) -> int | None:
        """The recorded step that computes these rows, if one does."""
        bucket = bucket_of(len(rows), self._buckets)
        if bucket is None or not all(row.sample and row.num_tokens == 1 for row in rows):
            return None
        return bucket if self._attention.decode_fits([row.start + 1 for row in rows], bucket) else None

    @torch.inference_mode()
    def _record(self) -> None:
        self._use_device()
        self._graphs.record()

    def _use_device(self) -> None:
        """Kernels are launched on the current device of the thread."""
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)
