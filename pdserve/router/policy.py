"""What a routing policy is, and the scaffold a simple one stands on. Recipe: docs/recipes/add-a-routing-policy.md."""

from collections.abc import Callable
from typing import Protocol

from pdserve.core.cluster import Candidate, ClusterState, EngineView, Mode, Route, RouteAsk
from pdserve.router.options import LocalOption, Options
from pdserve.router.rendezvous import name_bits, turn

Score = Callable[[EngineView], float]
"""Lower is better."""
_PAIRED = 3
"""Pairs are formed of so many of the best engines of each pool."""
_ALTERNATIVES = 8


class RoutingPolicy(Protocol):
    """Chooses one route for one request. Built once per gateway with the RoutingRules.

    choose must not wait, and must choose engines that are ready and not in ask.excluded; find_options gives
    exactly those. Raises Unavailable when there are none.
    """

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route: ...


def route_by_scores(options: Options, ask: RouteAsk, prefill: Score, decode: Score, reason: str) -> Route:
    """The route of the best-scored engines: a short prompt stays on a decode engine, otherwise a pair, otherwise
    one engine for both. The prompt settles ties; a local option counts with both scores."""
    short = tuple(option for option in options.local if option.short)
    if short or not options.pairs:
        return _local_route(short or options.local, ask, lambda view: prefill(view) + decode(view))
    prefills = sorted(options.prefills, key=_by(prefill, ask))
    decodes = sorted(options.decodes, key=_by(decode, ask))
    pairs = options.joined(prefills[:_PAIRED], decodes[:_PAIRED])
    best, *others = sorted(pairs, key=lambda pair: prefill(pair[0]) + decode(pair[1]))
    return Route(
        mode=Mode.DISAGGREGATED,
        prefill=best[0].endpoint,
        decode=best[1].endpoint,
        reason=reason,
        uncached_tokens=ask.uncached(best[0].key),
        alternatives=tuple(
            Candidate(
                prefill=p.endpoint.engine_id,
                decode=d.endpoint.engine_id,
                mode=Mode.DISAGGREGATED,
                cost=prefill(p) + decode(d),
                reason=reason,
            )
            for p, d in others[:_ALTERNATIVES]
        ),
    )


def _by(score: Score, ask: RouteAsk) -> Callable[[EngineView], tuple[float, int]]:
    name = name_bits(ask.prompt_name)
    return lambda view: (score(view), turn(name, view.endpoint.engine_id))


def _local_route(options: tuple[LocalOption, ...], ask: RouteAsk, score: Score) -> Route:
    order = _by(score, ask)
    ranked = sorted(options, key=lambda option: order(option.view))
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
            for option in ranked[1 : 1 + _ALTERNATIVES]
        ),
    )
