"""The policies that come with pdserve."""

from collections.abc import Callable

from pdserve.core.cluster import ClusterState, EngineView, Mode, Route, RouteAsk
from pdserve.router import load
from pdserve.router.cost import as_candidate, explain, ranked, to_compute
from pdserve.router.options import find_options
from pdserve.router.peer_policies import Dynamo, LlmD
from pdserve.router.policy import RoutingPolicy, route_by_scores
from pdserve.router.rules import RoutingRules
from pdserve.router.shortlist import Shortlist


class RoundRobin:
    """Every engine of a pool in turn, whatever it is doing: the baseline."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules
        self._chosen: dict[str, int] = {}
        self._turn = 0

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        route = route_by_scores(find_options(ask, state, self._rules), ask, self._last, self._last, "next in turn")
        self._turn += 1
        self._chosen = {v.endpoint.engine_id: self._last(v) for v in state.engines}
        self._chosen[route.prefill.engine_id] = self._chosen[route.decode.engine_id] = self._turn
        return route

    def _last(self, view: EngineView) -> int:
        """The turn in which the engine was chosen last."""
        return self._chosen.get(view.endpoint.engine_id, 0)


class LeastLoaded:
    """The engines with the shortest queues, blind to what they hold in their caches."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        def queue(view: EngineView) -> float:
            return load.backlog_tokens(view, state.now) * load.seconds_per_prompt_token(view)

        options = find_options(ask, state, self._rules)
        return route_by_scores(options, ask, queue, load.requests, "shortest queues")


class LongestPrefix:
    """The engines that hold most of the prompt; among equals the least loaded."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        def score(view: EngineView) -> float:
            # Whole tokens first: the busy part stays below one.
            busy = load.requests(view) + load.backlog_tokens(view, state.now)
            return ask.uncached(view.key) + busy / (1 + busy)

        options = find_options(ask, state, self._rules)
        return route_by_scores(options, ask, score, score, "longest cached prefix")


class KVAware:
    """The least predicted cost over prefill engine, decode engine and mode together (router.cost)."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules
        self._shortlist = Shortlist(rules)

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        state = self._shortlist.of(ask, state)
        options = find_options(ask, state, self._rules)
        best, *others = ranked(ask, options, state, self._rules)
        prediction, prefill, decode, option = best
        tied = "; settled by the prompt among equals" if others and others[0][0].cost < prediction.cost else ""
        return Route(
            mode=option.mode if option else Mode.DISAGGREGATED,
            prefill=prefill.endpoint,
            decode=decode.endpoint,
            reason=explain(best, ask) + tied,
            alternatives=tuple(as_candidate(choice, ask) for choice in others[: self._rules.max_alternatives]),
            uncached_tokens=to_compute(best, ask),
            prediction=prediction,
            fetch=prediction.fetch,
        )


BUILT_IN: dict[str, Callable[[RoutingRules], RoutingPolicy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "prefix": LongestPrefix,
    "kv_aware": KVAware,
    "dynamo": Dynamo,
    "llm_d": LlmD,
}
