"""What one engine tells a gateway of its share of a request: tokens, and how it came by them."""

from pdserve.core.endpoint import Endpoint
from pdserve.core.request import EngineTrace, FinishReason, PrefixFetch
from pdserve.core.token_delta import TokenDelta
from pdserve.engine.core_events import Emitted, Finished
from pdserve.engine.handoff_target import FetchOutcome
from pdserve.engine.pull_tally import PullTally


def to_delta(event: Emitted, finish_reason: FinishReason | None) -> TokenDelta:
    """finish_reason: also of a request that goes on elsewhere."""
    return TokenDelta(
        request_id=event.request_id,
        index=event.index,
        token_ids=event.token_ids,
        logprobs=event.logprobs,
        finish_reason=finish_reason,
        error=event.error,
    )


def engine_trace(
    endpoint: Endpoint, event: Finished, outcome: FetchOutcome | None, fetch: PrefixFetch | None
) -> EngineTrace:
    """outcome: of its ticket's KV; fetch: of its prompt's beginning from another cache."""
    stamps = event.stamps + (outcome.stamps if outcome else ())
    return EngineTrace(
        engine_id=endpoint.engine_id,
        epoch=endpoint.epoch,
        cached_tokens=event.cached_tokens,
        stamps=tuple(sorted(stamps, key=lambda stamp: stamp[1])),
        fetch=fetch,
        **(outcome.pulled if outcome else PullTally()).trace(),
    )
