"""What fetching a prompt's beginning from another engine's cache would take, and what it would save. Pure."""

from collections.abc import Iterable
from heapq import nsmallest
from math import ceil, inf

from pdserve.core.cluster import FETCH_SECONDS, ClusterState, EngineView, FetchPlan, RouteAsk
from pdserve.core.endpoint import EngineState
from pdserve.core.ticket import KVSource
from pdserve.router import load
from pdserve.router.rules import RoutingRules


def find_sources(ask: RouteAsk, state: ClusterState, rules: RoutingRules) -> tuple[EngineView, ...]:
    """Engines that have announced KV of the prompt's beginning and may be asked for it: the few that hold most, so that
    a beginning which hundreds share costs no more to route."""
    if not rules.fetch:
        return ()
    holders = (
        view
        for view in state.engines
        if (hit := ask.hits.get(view.key))
        and hit.pool_tokens
        and view.endpoint.state is EngineState.READY
        and not (view.load and view.load.draining)
        and view.key not in ask.excluded
        and view.key not in ask.parted
    )
    return tuple(
        nsmallest(rules.pool_top, holders, key=lambda view: (-ask.hits[view.key].tokens, view.endpoint.engine_id))
    )


def best_fetch(
    ask: RouteAsk, target: EngineView, sources: Iterable[EngineView], rules: RoutingRules
) -> FetchPlan | None:
    """The fetch after which the target has computed the prompt soonest, whether or not that is sooner than without;
    None when nobody has more of it than the target. Ties go to the lower engine id."""
    plans = [plan for source in sources if (plan := _plan(ask, target, source, rules))]
    return min(plans, key=lambda plan: (plan.seconds - plan.saved_seconds, plan.source.engine_id), default=None)


def _plan(ask: RouteAsk, target: EngineView, source: EngineView, rules: RoutingRules) -> FetchPlan | None:
    if source.key == target.key or source.key in target.lost_links or target.capacity is None:
        return None
    size = target.capacity.block_size
    blocks = min(ask.hits[source.key].pool_tokens, ask.prompt_tokens - 1) // size
    cached = ask.prompt_tokens - ask.uncached(target.key)
    tokens = blocks * size
    if not target.capacity.prefix_caching or tokens <= cached:
        return None
    per_token = target.fetch_speeds.get(source.key, rules.fetch_seconds_per_token)
    saved = _compute(ask, target, cached) - _compute(ask, target, tokens)
    least = _break_even(
        FETCH_SECONDS * (1 + rules.fetch_margin),
        saved / (tokens - cached) - per_token * (1 + rules.fetch_margin),
    )
    endpoint = source.endpoint
    return FetchPlan(
        source=KVSource(
            engine_id=endpoint.engine_id,
            epoch=endpoint.epoch,
            address=endpoint.address,
            num_blocks=blocks,
            least_blocks=max(1, min(blocks, ceil(least / size))) if least < inf else blocks,
        ),
        tokens=tokens,
        seconds=FETCH_SECONDS + per_token * (tokens - cached),
        saved_seconds=saved,
    )


def _compute(ask: RouteAsk, view: EngineView, cached_tokens: int) -> float:
    return load.prompt_seconds(view.step_model, view.capacity, ask.prompt_tokens, cached_tokens)


def _break_even(overhead: float, gain_per_token: float) -> float:
    """Tokens from which on a fetch pays."""
    return overhead / gain_per_token if gain_per_token > 0 else inf
