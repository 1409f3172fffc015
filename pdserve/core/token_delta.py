"""What is streamed of a request, in a module of its own: msgspec makes it fast, and a worker has no msgspec."""

import msgspec

from pdserve.core.request import EngineTrace, FinishReason


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tokens one engine step added to one request; the streamed unit.

    index is the position of token_ids[0] among the request's output tokens, so that a receiver can
    drop repeats and notice gaps. logprobs, when asked for, align with token_ids (natural log of the
    unfiltered, temperature-1 distribution). The last delta carries finish_reason.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    error: tuple[str, str] | None = None
    """(code, message) when finish_reason is ERROR."""
    trace: EngineTrace | None = None
