"""What the core tells of a sequence as it is: its tokens, its end."""

from pdserve.core.errors import PdserveError
from pdserve.core.request import FinishReason
from pdserve.engine.core_events import Emitted, Finished
from pdserve.engine.sequence import Sequence


def emitted(
    sequence: Sequence,
    index: int,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[float, ...] | None = None,
    finish_reason: FinishReason | None = None,
    error: PdserveError | None = None,
) -> Emitted:
    return Emitted(
        sequence_id=sequence.sequence_id,
        request_id=sequence.request.id,
        index=index,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=finish_reason,
        error=(error.code, str(error)) if error else None,
    )


def finished(sequence: Sequence) -> Finished:
    return Finished(
        sequence_id=sequence.sequence_id,
        cached_tokens=sequence.num_cached_tokens or 0,
        stamps=tuple(sequence.stamps),
    )
