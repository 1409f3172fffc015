"""What fetching a prompt's beginning from another engine's cache would take, and what it would save. Pure."""

from collections.abc import Iterable
from math import ceil, inf
from operator import itemgetter
from typing import NamedTuple

from pdserve.core.cluster import FETCH_SECONDS, ClusterState, EngineView, FetchPlan, PrefixHit, RouteAsk
from pdserve.core.endpoint import EngineState, most_lent
from pdserve.core.ticket import KVSource
from pdserve.router import load
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import fetch_seconds_per_token, may_carry

_SOURCES = 3
"""One of them may be the engine that fetches, and another's link slow."""


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

    return tuple(sorted(holders, key=rank)[:_SOURCES])


class _Option(NamedTuple):
    """One way to fetch. net: seconds it takes, less what it saves; saved and per_token in seconds, the latter with what
    the source takes to restore."""

    net: float
    engine_id: str
    source: EngineView
    blocks: int
    per_token: float
    saved: float


_ORDER = itemgetter(0, 1)
"""Of options."""


def best_fetch(
    ask: RouteAsk, target: EngineView, sources: Iterable[EngineView], rules: RoutingRules
) -> FetchPlan | None:
    """The fetch after which the target has computed the prompt soonest, whether or not that is sooner than without;
    None when nobody has more of it than the target. Ties go to the lower engine id."""
    if target.capacity is None or not target.capacity.prefix_caching:
        return None
    cached = ask.prompt_tokens - ask.uncached(target.key)
    options: list[_Option] = []
    alone = 0.0
    for source in sources:
        hit = ask.hits[source.key]
        # Often the target holds as much; then nothing else need be looked at.
        if hit.tokens <= cached or source.key == target.key or not may_carry(source, target, rules):
            continue
        alone = alone or _compute(ask, target, cached)
        per_token = fetch_seconds_per_token(source, target, rules)
        for tokens in _reaches(hit, source, cached):
            if option := _option(ask, target, source, hit, tokens, cached, alone, per_token):
                options.append(option)
    return _plan(min(options, key=_ORDER), target, cached, rules) if options else None


def _reaches(hit: PrefixHit, source: EngineView, cached: int) -> tuple[int, ...]:
    """How many tokens a source may be asked for, up to what it lends behind those the target has cached: those in its
    pool, or also those in its tiers as far as it has blocks to restore them into."""
    capacity = source.capacity
    if capacity is None:
        return (hit.pool_tokens,)
    size = capacity.block_size
    most = cached + most_lent(capacity.num_blocks) * size
    in_pool = min(most, hit.pool_tokens)
    if not hit.restored_tokens or source.load is None:
        return (in_pool,)
    return in_pool, min(most, hit.tokens, max(hit.pool_tokens, cached) + source.load.blocks.spare * size)


def _option(
    ask: RouteAsk,
    target: EngineView,
    source: EngineView,
    hit: PrefixHit,
    reach: int,
    cached: int,
    alone: float,
    per_token: float,
) -> _Option | None:
    """cached: tokens the target has; alone: seconds it would compute the others; per_token: of the fetch."""
    assert target.capacity is not None
    size = target.capacity.block_size
    blocks = min(reach, ask.prompt_tokens - 1) // size
    tokens = blocks * size
    if tokens <= cached:
        return None
    # What lies in its pool, or is not fetched from it, the source need not restore.
    if hit.restored_tokens and (restored := tokens - max(hit.pool_tokens, cached)) > 0:
        per_token += hit.restore_seconds * restored / hit.restored_tokens / (tokens - cached)
    saved = alone - _compute(ask, target, tokens)
    net = FETCH_SECONDS + per_token * (tokens - cached) - saved
    return _Option(net, source.endpoint.engine_id, source, blocks, per_token, saved)


def _plan(option: _Option, target: EngineView, cached: int, rules: RoutingRules) -> FetchPlan:
    assert target.capacity is not None
    size, blocks = target.capacity.block_size, option.blocks
    fetched = blocks * size - cached
    least = _break_even(
        FETCH_SECONDS * (1 + rules.fetch_margin),
        option.saved / fetched - option.per_token * (1 + rules.fetch_margin),
    )
    endpoint = option.source.endpoint
    return FetchPlan(
        source=KVSource(
            engine_id=endpoint.engine_id,
            epoch=endpoint.epoch,
            address=endpoint.address,
            num_blocks=blocks,
            least_blocks=max(1, min(blocks, ceil(least / size))) if least < inf else blocks,
        ),
        tokens=blocks * size,
        seconds=FETCH_SECONDS + option.per_token * fetched,
        saved_seconds=option.saved,
    )


def _compute(ask: RouteAsk, view: EngineView, cached_tokens: int) -> float:
    return load.prompt_seconds(view.step_model, view.capacity, ask.prompt_tokens, cached_tokens)


def _break_even(overhead: float, gain_per_token: float) -> float:
    """Tokens from which on a fetch pays."""
    return overhead / gain_per_token if gain_per_token > 0 else inf
