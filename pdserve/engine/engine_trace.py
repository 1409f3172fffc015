"""What one engine tells of its share of a request, gathered from those who took part."""

from pdserve.core.endpoint import Endpoint
from pdserve.core.request import EngineTrace, PrefixFetch
from pdserve.engine.core_events import Finished
from pdserve.engine.handoff_target import FetchOutcome
from pdserve.engine.pull_tally import PullTally


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
