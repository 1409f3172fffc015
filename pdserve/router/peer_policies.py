"""The published scores of two other routers, at their defaults, as policies to compare with.

Only the scores are theirs. What they look at is what this router knows: an exact index of every cache, and bookings
from dispatch on where they read scraped metrics, which is to their advantage. Queues in front of the engines, which
both have, are left out, as admission is. Ties are settled by the prompt instead of by chance.
"""

from collections.abc import Mapping, Sequence

from pdserve.core.cluster import ClusterState, EngineKey, EngineView, Route, RouteAsk
from pdserve.router import load
from pdserve.router.options import find_options
from pdserve.router.policy import route_by_scores
from pdserve.router.rules import RoutingRules


class Dynamo:
    """NVIDIA Dynamo's KV router:

        logit = prefill_load_scale · max(0, prefill tokens - overlap_score_credit · cached) + active blocks

    in blocks of any size, with both weights at 1 and router_temperature 0: the lowest wins. Prefill tokens are those of
    requests without a first token, of each as many as were not cached, and the whole prompt's; active blocks those of
    the prompts of all requests that have not ended, this one's included (output is not tracked). A prefill pool's
    router does not count active blocks, a decode pool's neither prefill tokens nor the cache. Here a prefix that
    several active requests share counts for each of them.

    Source: ai-dynamo/dynamo, lib/kv-router/src/scheduling/selector (DefaultWorkerScorer) and config.rs;
    docs.nvidia.com/dynamo, "Disaggregated Serving" of the router (versions 1.2 to 1.6).
    """

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        def prefill(view: EngineView) -> float:
            return float(view.booked.prompt_tokens + ask.uncached(view.key))

        def active(view: EngineView) -> float:
            return float(sum(row.context_tokens for row in view.booked.decoding) + ask.prompt_tokens)

        return route_by_scores(find_options(ask, state, self._rules), ask, prefill, active, "lowest logit")


PREFIX_WEIGHT, UTILISATION_WEIGHT, QUEUE_WEIGHT, COLD_WEIGHT = 3.0, 2.0, 2.0, 2.0
STICKY_SHARE = 0.8
STICKY_SECONDS = 18.0
MOST_TOKENS = 4_194_304


class LlmD:
    """llm-d's scorers as two of its guides set them; the highest sum wins (max-score-picker).

    Engines that do both (precise-prefix-cache-routing): 3 · prefix-cache-scorer + 2 · kv-cache-utilization-scorer
    + 2 · queue-scorer + 2 · no-hit-lru-scorer, each between 0 and 1. prefix: cached share of the prompt. utilization:
    share of the KV memory no request holds. queue: 1 where fewest requests wait, 0 where most do. no-hit-lru: of a
    prompt that is cached nowhere, 1 where it is longest ago that one was computed, 0 where it is shortest.

    A pair (pd-disaggregation): the prefill engine with the fewest uncached tokens of requests without a first token,
    the request's included (token-load-scorer), of those that have 0.8 of the prompt, if there are any and the best of
    them is not 18 s behind the best of the others (prefix-cache-affinity-filter; its peakPrefillThroughput, to be
    measured, is what the engine's steps show). The decode engine with the fewest requests (active-request-scorer).

    Source: github.com/llm-d/llm-d, guides/*/router/*.values.yaml; github.com/llm-d/llm-d-router, pkg/epp.
    """

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules
        self._cold: dict[EngineKey, int] = {}
        """Engine → number of the last prompt that was cached nowhere and went there."""
        self._number = 0

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        options = find_options(ask, state, self._rules)
        if options.pairs:
            tokens = _token_loads(options.prefills, ask)
            return route_by_scores(options, ask, lambda view: tokens.get(view.key, 0.0), load.requests, "highest score")
        views = tuple(option.view for option in options.local)
        scores = self._scores(views, ask)
        route = route_by_scores(options, ask, lambda view: -scores[view.key], lambda view: 0.0, "highest score")
        if _is_cold(views, ask):
            self._number += 1
            there = {view.key for view in state.engines}
            self._cold = {key: number for key, number in self._cold.items() if key in there}
            self._cold[route.decode.key] = self._number
        return route

    def _scores(self, views: Sequence[EngineView], ask: RouteAsk) -> dict[EngineKey, float]:
        queues = _shares({view.key: _waiting(view) for view in views})
        colds = self._cold_ranks(views) if _is_cold(views, ask) else dict.fromkeys(queues, 0.5)

        def score(view: EngineView) -> float:
            cached = 1 - ask.uncached(view.key) / ask.prompt_tokens
            room = load.kv_tokens(view)
            used = min(1.0, load.reserved_tokens(view) / room) if room else 0.0
            return (
                PREFIX_WEIGHT * cached
                + UTILISATION_WEIGHT * (1 - used)
                + QUEUE_WEIGHT * (1 - queues[view.key])
                + COLD_WEIGHT * colds[view.key]
            )

        return {view.key: score(view) for view in views}

    def _cold_ranks(self, views: Sequence[EngineView]) -> dict[EngineKey, float]:
        oldest_first = sorted((view.key for view in views), key=lambda key: self._cold.get(key, 0))
        return {key: 1 - rank / max(1, len(views) - 1) for rank, key in enumerate(oldest_first)}


def _token_loads(pool: Sequence[EngineView], ask: RouteAsk) -> dict[EngineKey, float]:
    """Less is better; what the filter takes out comes after all others."""
    sticky = {view.key for view in pool if 1 - ask.uncached(view.key) / ask.prompt_tokens >= STICKY_SHARE}
    behind = {view.key: view.booked.prompt_tokens * load.seconds_per_prompt_token(view) for view in pool}
    others = [seconds for key, seconds in behind.items() if key not in sticky]
    if sticky and others and min(behind[key] for key in sticky) - min(others) > STICKY_SECONDS:
        sticky = set()
    return {
        view.key: min(1.0, (view.booked.prompt_tokens + ask.uncached(view.key)) / MOST_TOKENS)
        + (1.0 if sticky and view.key not in sticky else 0.0)
        for view in pool
    }


def _is_cold(views: Sequence[EngineView], ask: RouteAsk) -> bool:
    return all(ask.uncached(view.key) == ask.prompt_tokens for view in views)


def _waiting(view: EngineView) -> int:
    return len(view.booked.unseen) + (view.load.waiting if view.load else 0)


def _shares(queues: Mapping[EngineKey, int]) -> dict[EngineKey, float]:
    """0 for the shortest, 1 for the longest; 0 for all where they are equal."""
    shortest, longest = min(queues.values(), default=0), max(queues.values(), default=0)
    return {key: (queue - shortest) / max(1, longest - shortest) for key, queue in queues.items()}
