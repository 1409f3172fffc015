"""The first computation of a worker, before anybody waits for it or watches whether it answers."""

import torch

from pdserve.attention.base import AttentionBackend
from pdserve.core.batch import Batch, Row
from pdserve.model.loader import LoadedModel
from pdserve.worker.inputs import InputBuilder
from pdserve.worker.kv_tensors import KVTensors


@torch.inference_mode()
def warm_up(loaded: LoadedModel, attention: AttentionBackend, kv: KVTensors) -> None:
    """Compute one token, which compiles kernels where their code is not on disk yet: seconds in which the interpreter
    does nothing else. The KV memory is left zeroed. With several ranks, all of them call it."""
    row = Row(sequence_id=0, start=0, num_tokens=1, token_ids=(0,), block_ids=(0,))
    batch = Batch(step=0, rows=(row,))
    inputs = InputBuilder(block_size=kv.layout.block_size, device=loaded.device).build(batch, {})
    loaded.model(inputs.token_ids, inputs.positions, attention.plan(inputs.attention), kv.layers)
    for layer in kv.layers:
        layer[0].zero_()
