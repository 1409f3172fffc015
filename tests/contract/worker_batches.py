"""Batches that run one prompt in two chunks and then sample, with up to two steps in flight."""

from collections.abc import AsyncIterator

from pdserve.core.batch import Batch, Row, SamplerInit, StepOutput, TokenSource
from pdserve.core.protocols import Executor
from tests.stepping import GREEDY

PROMPT = tuple(range(5, 42))
BLOCK_SIZE = 16


def prefill(step: int, block_ids: tuple[int, ...], *, start: int = 0, end: int = len(PROMPT)) -> Batch:
    """Prompt positions [start, end); samples when that is the prompt's end."""
    last = end == len(PROMPT)
    return _batch(step, block_ids, start, PROMPT[start:end], GREEDY if last else None)


def decode(step: int, block_ids: tuple[int, ...], position: int, token: int | None) -> Batch:
    """One token at a position; None takes the step before's."""
    return _batch(step, block_ids, position, () if token is None else (token,), None)


def resume(step: int, block_ids: tuple[int, ...], token: int) -> Batch:
    """The first step of a sequence whose prompt another engine computed."""
    return _batch(step, block_ids, len(PROMPT), (token,), GREEDY)


def _batch(
    step: int, block_ids: tuple[int, ...], start: int, token_ids: tuple[int, ...], sampler: SamplerInit | None
) -> Batch:
    row = Row(
        sequence_id=1,
        start=start,
        num_tokens=len(token_ids) or 1,
        token_ids=token_ids,
        block_ids=block_ids,
        token_source=TokenSource.KNOWN if token_ids else TokenSource.PREVIOUS_STEP,
        sample=start + (len(token_ids) or 1) >= len(PROMPT),
        sampler=sampler,
    )
    return Batch(step=step, rows=(row,))


async def run(executor: Executor, *batches: Batch) -> AsyncIterator[tuple[int, ...]]:
    """Each batch's sampled tokens (none for a chunk), submitting the next one before collecting."""
    waiting = []
    for batch in batches:
        handle = executor.forward(batch)
        executor.sample(handle)
        waiting.append(handle)
        if len(waiting) == 2:
            yield _tokens(await executor.collect(waiting.pop(0)))
    for handle in waiting:
        yield _tokens(await executor.collect(handle))


def _tokens(output: StepOutput) -> tuple[int, ...]:
    return tuple(token for row in output.rows for token in row.token_ids)
