"""The first computation of a worker, before anybody waits for it or watches whether it answers."""

import torch

from pdserve.attention.base import AttentionBackend
from pdserve.core.batch import Batch, Row, SamplerInit, TokenSource
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


def prompt_steps(*, more_than: int, room: int, block_size: int) -> list[tuple[Row, ...]]:
    """Steps that together launch whatever steps with prompts launch: one of more than so many tokens, and one of a
    short prompt beside a sequence that decodes. A sequence has room for so many tokens, two or more. All of them lie in
    block 0, one over the other; ids are negative."""
    longest = min(more_than + 1, room - 1)
    prompts = tuple(_prompt(-1 - i, longest, block_size) for i in range(more_than // longest + 1))
    first = prompts[0]._replace(
        start=longest,
        num_tokens=1,
        token_ids=(),
        block_ids=(0,) * (longest // block_size + 1),
        token_source=TokenSource.PREVIOUS_STEP,
        sampler=None,
    )
    return [prompts, (first, _prompt(-1 - len(prompts), min(longest, block_size), block_size))]


def _prompt(sequence_id: int, tokens: int, block_size: int) -> Row:
    return Row(
        sequence_id=sequence_id,
        start=0,
        num_tokens=tokens,
        token_ids=(0,) * tokens,
        block_ids=(0,) * -(-tokens // block_size),
        sample=True,
        sampler=SamplerInit(),
    )
