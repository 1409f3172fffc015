"""What fetching a prompt's beginning from another engine's cache would take, and what it would save. Pure."""

from collections.abc import Iterable
from heapq import nsmallest
from math import ceil, inf

from pdserve.core.cluster import FETCH_SECONDS, ClusterState, EngineView, FetchPlan, RouteAsk
from pdserve.core.endpoint import EngineState, most_lent
from pdserve.core.ticket import KVSource
from pdserve.router import load
from pdserve.router.rules import RoutingRules


def find_sources(ask: RouteAsk, state: ClusterState, rules: RoutingRules) -> tuple[EngineView, ...]:
    """Engines that have announced KV of the prompt's beginning and may be asked for it: the few that hold most, in
    pool or tier, so that a beginning which hundreds share costs no more to route."""
    if not rules.fetch:
        return ()
    holders = (
        view
        for view in state.engines
        if (hit := ask.hits.get(view.key))
        and hit.tokens
        and view.endpoint.state is EngineState.READY
        and not (view.load and view.load.draining)
        and view.key not in ask.excluded
        and view.key not in ask.parted
    )

    def rank(view: EngineView) -> tuple[int, float, str]:
        hit = ask.hits[view.key]
        return -hit.tokens, hit.restore_seconds, view.endpoint.engine_id

    return tuple(nsmallest(rules.pool_top, holders, key=rank))


def best_fetch(
    ask: RouteAsk, target: EngineView, sources: Iterable[EngineView], rules: RoutingRules
) -> FetchPlan | None:
    """The fetch after which the target has computed the prompt soonest, whether or not that is sooner than without;
    None when nobody has more of it than the target. Ties go to the lower engine id."""
    plans = [
        plan
        for source in sources
        for tokens in _reaches(ask, target, source)
        if (plan := _plan(ask, target, source, tokens, rules))
    ]
    return min(plans, key=lambda plan: (plan.seconds - plan.saved_seconds, plan.source.engine_id), default=None)


def _reaches(ask: RouteAsk, target: EngineView, source: EngineView) -> tuple[int, ...]:
    """How many tokens a source may be asked for, up to what it lends behind those the target holds: those in its pool,
    or also those in its tiers as far as it has blocks to restore them into."""
    hit = ask.hits[source.key]
    if source.capacity is None:
        return (hit.pool_tokens,)
    size = source.capacity.block_size
    most = _held(ask, target) + most_lent(source.capacity.num_blocks) * size
    in_pool = min(most, hit.pool_tokens)
    if not hit.restored_tokens or source.load is None:
        return (in_pool,)
    return in_pool, min(most, hit.tokens, _here(ask, target, source) + source.load.blocks.spare * size)


def _held(ask: RouteAsk, target: EngineView) -> int:
    """Tokens the target need not fetch."""
    return ask.prompt_tokens - ask.uncached(target.key)


def _here(ask: RouteAsk, target: EngineView, source: EngineView) -> int:
    """Tokens that the source need not restore to lend them, or that are not fetched from it."""
    return max(ask.hits[source.key].pool_tokens, _held(ask, target))


def _restore_seconds(ask: RouteAsk, target: EngineView, source: EngineView, tokens: int) -> float:
    """What the source takes to restore what lies in its tiers of the prompt's first tokens, and is fetched."""
    hit, restored = ask.hits[source.key], tokens - _here(ask, target, source)
    return hit.restore_seconds * restored / hit.restored_tokens if restored > 0 else 0.0


def _plan(ask: RouteAsk, target: EngineView, source: EngineView, reach: int, rules: RoutingRules) -> FetchPlan | None:
    if source.key == target.key or source.key in target.lost_links or target.capacity is None:
        return None
    size = target.capacity.block_size
    blocks = min(reach, ask.prompt_tokens - 1) // size
    cached = _held(ask, target)
    tokens = blocks * size
    if not target.capacity.prefix_caching or tokens <= cached:
        return None
    per_token = target.fetch_speeds.get(source.key, rules.fetch_seconds_per_token)
    per_token += _restore_seconds(ask, target, source, tokens) / (tokens - cached)
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
