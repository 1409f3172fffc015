"""The published scores of two other routers, as policies to compare with.

Only the scores are theirs. What they look at is what this router knows: bookings are counted at dispatch and not read
from scraped metrics, which is to their advantage. Ties are settled by the prompt instead of by chance.
"""

from collections.abc import Sequence

from pdserve.core.cluster import ClusterState, EngineView, Route, RouteAsk
from pdserve.router import load
from pdserve.router.options import find_options
from pdserve.router.policy import route_by_scores
from pdserve.router.rules import RoutingRules

_BLOCK = 16
"""Tokens. The score is a sum of blocks, so that their size does not change the order."""
OVERLAP_WEIGHT = 1.0
PREFIX_WEIGHT, UTILISATION_WEIGHT, QUEUE_WEIGHT = 3.0, 2.0, 2.0


class Dynamo:
    """NVIDIA Dynamo's KV router at its defaults (router-temperature 0):

        logit = overlap_score_weight · potential prefill blocks + potential active blocks; the lowest wins

    Prefill blocks are those being computed and the request's that are not cached; active blocks are all that running
    requests hold, the request's included. Of a pair the prefill engine is chosen by the logit, the decode engine by its
    active blocks alone. Source: docs.nvidia.com/dynamo, components/router ("Cost function", versions 0.4 to 1.2).
    """

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        def prefill_blocks(view: EngineView) -> float:
            return (load.backlog_tokens(view, state.now) + ask.uncached(view.key)) / _BLOCK

        def active_blocks(view: EngineView) -> float:
            return (load.reserved_tokens(view) + ask.prompt_tokens) / _BLOCK

        def prefill(view: EngineView) -> float:
            return OVERLAP_WEIGHT * prefill_blocks(view) + active_blocks(view)

        options = find_options(ask, state, self._rules)
        if options.pairs:
            return route_by_scores(options, ask, prefill, active_blocks, "lowest logit")
        return route_by_scores(options, ask, prefill, lambda view: 0.0, "lowest logit")


class LlmD:
    """llm-d's scorers with the weights of its guide to precise prefix-cache routing: 3 · prefix-cache-scorer
    + 2 · kv-cache-utilization-scorer + 2 · queue-scorer, each between 0 and 1; the highest sum wins (max-score-picker).

    prefix: cached share of the prompt. utilization: share of the KV memory no request holds. queue: 1 where fewest
    requests wait, 0 where most do. Both engines of a pair are chosen so. Source: github.com/llm-d/llm-d,
    guides/precise-prefix-cache-routing; the scorers in github.com/llm-d/llm-d-router, pkg/epp.
    """

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        options = find_options(ask, state, self._rules)
        locals_ = tuple(option.view for option in options.local)
        scores = {
            view.key: score
            for pool in (options.prefills, options.decodes, locals_)
            for view, score in _scored(pool, ask)
        }

        def lowest(view: EngineView) -> float:
            return -scores[view.key]

        return route_by_scores(options, ask, lowest, lowest, "highest score")


def _scored(pool: Sequence[EngineView], ask: RouteAsk) -> list[tuple[EngineView, float]]:
    queues = {view.key: view.booked.prefilling + (view.load.waiting if view.load else 0) for view in pool}
    shortest, longest = min(queues.values(), default=0), max(queues.values(), default=0)

    def score(view: EngineView) -> float:
        cached = 1 - ask.uncached(view.key) / ask.prompt_tokens
        room = load.kv_tokens(view)
        used = min(1.0, load.reserved_tokens(view) / room) if room else 0.0
        idle = (longest - queues[view.key]) / (longest - shortest) if longest > shortest else 1.0
        return PREFIX_WEIGHT * cached + UTILISATION_WEIGHT * (1 - used) + QUEUE_WEIGHT * idle

    return [(view, score(view)) for view in pool]
