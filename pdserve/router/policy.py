"""What a routing policy is, and the scaffold a simple one stands on. Recipe: docs/recipes/add-a-routing-policy.md."""

from collections.abc import Callable
from itertools import product
from typing import Protocol

from pdserve.core.cluster import Candidate, ClusterState, EngineView, Mode, Route, RouteAsk
from pdserve.router.options import LocalOption, Options

Score = Callable[[EngineView], float]
"""Lower is better."""


class RoutingPolicy(Protocol):
    """Chooses one route for one request. Built once per gateway with the RoutingRules.

    choose must not wait, and must choose engines that are ready and not in ask.excluded; find_options gives
    exactly those. Raises Unavailable when there are none.
    """

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route: ...


def route_by_scores(options: Options, ask: RouteAsk, prefill: Score, decode: Score, reason: str) -> Route:
    """The route of the best-scored engines: a short prompt stays on a decode engine, otherwise a pair, otherwise
    one engine for both. Ties go to the lower engine id; a local option counts with both scores."""
    short = tuple(option for option in options.local if option.short)
    if short or not options.pairs:
        return _local_route(short or options.local, ask, lambda view: prefill(view) + decode(view))
    prefills = sorted(options.prefills, key=lambda view: (prefill(view), view.endpoint.engine_id))
    decodes = sorted(options.decodes, key=lambda view: (decode(view), view.endpoint.engine_id))
    pairs = sorted(
        (
            (prefill(p) + decode(d), p.endpoint.engine_id, d.endpoint.engine_id)
            for p, d in product(prefills[:3], decodes[:3])
        ),
    )
    best = prefills[0].endpoint, decodes[0].endpoint
    return Route(
        mode=Mode.DISAGGREGATED,
        prefill=best[0],
        decode=best[1],
        reason=reason,
        uncached_tokens=ask.uncached(prefills[0].key),
        alternatives=tuple(
            Candidate(prefill=p, decode=d, mode=Mode.DISAGGREGATED, cost=score, reason=reason)
            for score, p, d in pairs
            if (p, d) != (best[0].engine_id, best[1].engine_id)
        ),
    )


def _local_route(options: tuple[LocalOption, ...], ask: RouteAsk, score: Score) -> Route:
    ranked = sorted(options, key=lambda option: (score(option.view), option.view.endpoint.engine_id))
    best = ranked[0]
    return Route(
        mode=best.mode,
        prefill=best.view.endpoint,
        decode=best.view.endpoint,
        reason=best.reason,
        uncached_tokens=ask.uncached(best.view.key),
        alternatives=tuple(
            Candidate(
                prefill=option.view.endpoint.engine_id if option.mode is Mode.PREFILL_LOCAL else None,
                decode=option.view.endpoint.engine_id if option.mode is Mode.DECODE_LOCAL else None,
                mode=option.mode,
                cost=score(option.view),
                reason=option.reason,
            )
            for option in ranked[1:9]
        ),
    )
