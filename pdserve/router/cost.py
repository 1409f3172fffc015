"""The joint cost of a candidate route: predicted TTFT, handoff gap and TPOT, as one scalar in seconds. Where a prompt's
beginning is fetched from a peer's cache if that is cheaper than computing it, the fetch is part of the candidate.

Pure functions of the views and of `now`. More load, or more tokens to compute, never makes a candidate
cheaper; a longer cached prefix never makes it dearer.
"""

from collections.abc import Callable
from functools import partial
from math import inf
from typing import NamedTuple

from pdserve.core.cluster import (
    RECENT_SECONDS,
    Candidate,
    ClusterState,
    EngineKey,
    EngineView,
    FetchPlan,
    Mode,
    Prediction,
    RouteAsk,
    expected_output,
)
from pdserve.core.endpoint import Role
from pdserve.router import load
from pdserve.router.fetching import best_fetch, find_sources
from pdserve.router.options import LocalOption, Options
from pdserve.router.rendezvous import name_bits, turn
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import are_apart, handoff_seconds_per_token, in_words

PROMPT_TIE = 1e-4
"""Share by which the costs of a prompt may differ and count as equal. It is small because recent work, which keeps
engines even, is itself a small part of that cost."""
TOKENS_TIE = 0.05
"""The same for the cost of tokens. No prediction is so good, and what else would decide is whether another request has
a few tokens left or none."""


class _Way(NamedTuple):
    """How an engine comes by a prompt's KV: seconds of computing, after a fetch or without, and those of both.

    burden on the others is in seconds of computing: what is fetched takes the place of as much KV in the engine's
    cache, so it weighs as if it were computed. doubt: by how much a fetch must be better than computing, for neither
    prediction is exact."""

    compute: float
    seconds: float
    burden: float
    doubt: float = 0.0
    fetch: FetchPlan | None = None

    @classmethod
    def after(cls, plan: FetchPlan, compute: float, margin: float) -> "_Way":
        """compute: seconds without the fetch."""
        rest = compute - plan.saved_seconds
        return cls(rest, rest + plan.seconds, rest + plan.saved_seconds, margin * plan.seconds, plan)


class _Chances(NamedTuple):
    """What awaits the prompt on one engine: seconds until it starts, the ways to come by its KV, and what a second of
    computing there costs others."""

    queue: float
    ways: tuple[_Way, ...]
    crowding: float


class _Tokens(NamedTuple):
    """What awaits the tokens on one engine: seconds per token with this request among the rows; those until there is
    room for it, which is the share of the engine that is asked for too much, times what a request of this one's length
    takes; what they cost, without that wait; and how many tokens of the prompt the engine lacks."""

    tpot: float
    wait: float
    cost: float
    lacking: int


class CostModel:
    """Prices the candidates of one request at one moment. sources: engines whose caches may be asked."""

    def __init__(self, ask: RouteAsk, now: float, rules: RoutingRules, sources: tuple[EngineView, ...] = ()) -> None:
        self._ask = ask
        self._now = now
        self._rules = rules
        self._sources = sources
        self._horizon = expected_output(ask.max_tokens)
        self._name = name_bits(ask.prompt_name)
        self._known_chances: dict[EngineKey, _Chances] = {}
        self._known_tokens: dict[EngineKey, _Tokens] = {}

    def pair(self, prefill: EngineView, decode: EngineView) -> Prediction:
        """Disaggregated: the prompt on one engine, the tokens on another.

        What the decode engine lacks is fetched while the prompt is computed, so only the part that takes longer than
        that shows."""
        tokens = self._tokens(decode)
        fetch, far = self._handoff(decode, prefill, tokens.lacking)
        return self._cheapest(self._chances(prefill), tokens, 0.0, self._rules.handoff_seconds, fetch, tokens.wait, far)

    def local(self, view: EngineView) -> Prediction:
        """One engine: the prompt waits for room there as well."""
        tokens, chances = self._tokens(view), self._chances(view)
        if view.endpoint.role is Role.PREFILL:
            tpot = load.seconds_amid_prompts(view, tokens.tpot, chances.queue / self._horizon)
            tokens = tokens._replace(tpot=tpot, cost=self._rules.tpot_weight * tpot * self._horizon)
        return self._cheapest(chances, tokens, tokens.wait, 0.0, 0.0, 0.0, 0.0)

    def best_prefills(self, views: tuple[EngineView, ...]) -> list[EngineView]:
        """The cheapest as far as the prompt goes."""
        return self._best(views, self._prefill_cost)

    def best_decodes(self, views: tuple[EngineView, ...], source: EngineView | None = None) -> list[EngineView]:
        """The cheapest as far as tokens and the fetch go, from source if that is known."""
        return self._best(views, partial(self._decode_cost, source=source))

    def best_pools(
        self, prefills: tuple[EngineView, ...], decodes: tuple[EngineView, ...]
    ) -> tuple[list[EngineView], list[EngineView]]:
        """The cheapest of both pools, and for each of them the cheapest of the other pool in its domain."""
        left, right = self.best_prefills(prefills), self.best_decodes(decodes)
        near_left = _nearest(prefills, right, self.best_prefills)
        near_right = _nearest(decodes, left, self.best_decodes)
        return [*left, *(v for v in near_left if v not in left)], [*right, *(v for v in near_right if v not in right)]

    def parts(self, prediction: Prediction) -> tuple[float, float]:
        """What the prompt and what the tokens of a candidate cost; the cost is their sum."""
        tokens = self._rules.tpot_weight * prediction.tpot * self._horizon
        return max(0.0, prediction.cost - tokens), tokens

    def turn(self, view: EngineView) -> int:
        """Of engines that cost the same the one with the least gets this prompt."""
        return turn(self._name, view.endpoint.engine_id)

    def _best(self, views: tuple[EngineView, ...], cost: Callable[[EngineView], float]) -> list[EngineView]:
        costs = {view.key: cost(view) for view in views}
        if len(set(costs.values())) == len(views):
            return sorted(views, key=lambda view: costs[view.key])[: self._rules.pool_top]
        return sorted(views, key=lambda view: (costs[view.key], self.turn(view)))[: self._rules.pool_top]

    def _prefill_cost(self, view: EngineView) -> float:
        queue, ways, crowding = self._chances(view)
        weight = self._rules.ttft_weight
        return min([weight * (queue + way.seconds + way.doubt) + crowding * way.burden for way in ways])

    def _handoff(self, decode: EngineView, source: EngineView | None, lacking: int) -> tuple[float, float]:
        """Seconds the KV takes that the decode engine lacks, and by how much that is longer than within a domain."""
        near = self._rules.fetch_seconds_per_token
        if source is None or not are_apart(source, decode):
            return near * lacking, 0.0
        per_token = handoff_seconds_per_token(source, decode, self._rules)
        return per_token * lacking, (per_token - near) * lacking

    def _decode_cost(self, view: EngineView, source: EngineView | None = None) -> float:
        tokens = self._tokens(view)
        fetch, far = self._handoff(view, source, tokens.lacking)
        return self._rules.gap_weight * (tokens.wait + fetch) + tokens.cost + self._rules.far_weight * far

    def _cheapest(
        self, chances: _Chances, tokens: _Tokens, first: float, least: float, fetch: float, wait: float, far: float
    ) -> Prediction:
        """By the cheapest way. In seconds: first until there is room for the prompt; least of a handoff, in which fetch
        hides behind computing; wait until there is room for the tokens; far as in _handoff."""
        rules, (queue, ways, crowding) = self._rules, chances
        lowest = inf
        best: tuple[float, float, FetchPlan | None] = inf, inf, None
        for way in ways:
            ttft = queue + way.seconds + first
            gap = least + max(0.0, fetch - way.compute) + wait
            cost = (
                rules.ttft_weight * (ttft + way.doubt)
                + rules.gap_weight * gap
                + tokens.cost
                + crowding * way.burden
                + rules.far_weight * far
            )
            if cost < lowest:
                lowest, best = cost, (ttft, gap, way.fetch)
        ttft, gap, plan = best
        return Prediction(ttft, gap, tokens.tpot, lowest, plan)

    def _chances(self, view: EngineView) -> _Chances:
        chances = self._known_chances.get(view.key)
        if chances is None:
            queue = load.backlog_tokens(view, self._now) * load.seconds_per_prompt_token(view)
            chances = self._known_chances[view.key] = _Chances(queue, self._ways(view), self._crowding(view))
        return chances

    def _ways(self, view: EngineView) -> tuple[_Way, ...]:
        compute = self._compute(view)
        computing = _Way(compute, compute, compute)
        if plan := best_fetch(self._ask, view, self._sources, self._rules):
            fetching = _Way.after(plan, compute, self._rules.fetch_margin)
            # One that is no sooner is no better otherwise: the others bear as much, and more of a handoff shows.
            if fetching.seconds + fetching.doubt < compute:
                return computing, fetching
        return (computing,)

    def _compute(self, view: EngineView) -> float:
        """With what a tier gives back in time; what takes longer than computing, the engine computes."""
        prompt, hit = self._ask.prompt_tokens, self._ask.hits.get(view.key)
        cached = prompt - self._ask.uncached(view.key)
        seconds = load.prompt_seconds(view.step_model, view.capacity, prompt, cached)
        if not hit or not hit.restored_tokens:
            return seconds
        pool_only = max(0, cached - hit.restored_tokens)
        computed = load.prompt_seconds(view.step_model, view.capacity, prompt, pool_only)
        return min(seconds + hit.restore_seconds, computed)

    def _tokens(self, view: EngineView) -> _Tokens:
        if known := self._known_tokens.get(view.key):
            return known
        prompt = self._ask.prompt_tokens
        rows, context = load.beside(view, prompt, self._horizon)
        tpot = view.step_model.seconds(rows + 1, context + prompt)
        most = load.max_rows(view)
        missing = max(0, load.requests(view) + 1 - most) / most
        if room := load.kv_tokens(view):
            wanted = load.reserved_tokens(view) + prompt + self._horizon
            missing = max(missing, (wanted - room) / room)
        cost = self._rules.tpot_weight * tpot * self._horizon
        known = _Tokens(tpot, missing * tpot * self._horizon, cost, self._ask.uncached(view.key))
        self._known_tokens[view.key] = known
        return known

    def _crowding(self, view: EngineView) -> float:
        """What a second of computing there costs others: those that meet it, the likelier the larger the share of its
        recent time the engine was given prompts for; and those whose KV has to make room."""
        utilisation = min(1.0, view.recent_work / RECENT_SECONDS)
        return self._rules.evict_weight * view.kv_filled + self._rules.spread_weight * utilisation


def _nearest(
    pool: tuple[EngineView, ...],
    others: list[EngineView],
    best: Callable[[tuple[EngineView, ...]], list[EngineView]],
) -> list[EngineView]:
    """Of a pool the best engine in each domain that one of the others is in."""
    domains = dict.fromkeys(view.domain for view in others if view.domain)
    neighbours = (tuple(view for view in pool if view.domain == domain) for domain in domains)
    return [best(there)[0] for there in neighbours if there]


Choice = tuple[Prediction, EngineView, EngineView, LocalOption | None]
"""(prediction, prefill, decode, option); in a local mode both views are the one engine."""


def ranked(ask: RouteAsk, options: Options, state: ClusterState, rules: RoutingRules) -> list[Choice]:
    """The candidates worth comparing, cheapest first; of hundreds of engines only each pool's best.

    Which of those that cost about as little as the cheapest comes first is up to the prompt. A short prompt's
    local candidates come first unless local_advantage says otherwise.
    """
    model = CostModel(ask, state.now, rules, find_sources(ask, state, rules))
    short = {option.view.key for option in options.local if option.short}
    found: list[Choice] = []
    if options.pairs:
        pairs = options.joined(*model.best_pools(options.prefills, options.decodes))
        found += [(model.pair(p, d), p, d, None) for p, d in pairs]
    found += [(model.local(option.view), option.view, option.view, option) for option in options.local]

    def cost(choice: Choice) -> float:
        prediction, _, _, option = choice
        return prediction.cost * (1.0 if option or not short else rules.local_advantage)

    found.sort(key=cost)
    first = _settled(found, model)
    return [first, *(choice for choice in found if choice is not first)]


def _settled(found: list[Choice], model: CostModel) -> Choice:
    """Of the choices that cost about as little as the cheapest, and are of its kind, the one to take."""
    cheapest, _, _, local = found[0]
    limits = [part * (1 + tie) for part, tie in zip(model.parts(cheapest), (PROMPT_TIE, TOKENS_TIE), strict=True)]
    most = sum(limits)

    def tied(choice: Choice) -> bool:
        if choice[0].cost > most:
            return False
        within = all(part <= limit for part, limit in zip(model.parts(choice[0]), limits, strict=True))
        return within and (choice[3] is None) is (local is None)

    return min(filter(tied, found), key=lambda choice: (model.turn(choice[1]), model.turn(choice[2])))


def to_compute(choice: Choice, ask: RouteAsk) -> int:
    """Prompt tokens whose KV is neither cached nor fetched."""
    prediction, prefill, _, _ = choice
    return ask.prompt_tokens - prediction.fetch.tokens if prediction.fetch else ask.uncached(prefill.key)


def as_candidate(choice: Choice, ask: RouteAsk) -> Candidate:
    prediction, prefill, decode, option = choice
    return Candidate(
        prefill=None if option and option.mode is Mode.DECODE_LOCAL else prefill.endpoint.engine_id,
        decode=None if option and option.mode is Mode.PREFILL_LOCAL else decode.endpoint.engine_id,
        mode=option.mode if option else Mode.DISAGGREGATED,
        cost=prediction.cost,
        reason=explain(choice, ask),
        prediction=prediction,
    )


def explain(choice: Choice, ask: RouteAsk) -> str:
    """A prediction in words."""
    prediction, prefill, decode, option = choice
    why = f"{option.reason}: " if option else ""
    expected = ask.expected(prefill.key)
    doubt = f" ({expected} expected in its cache, not announced)" if expected else ""
    return (
        f"{why}{to_compute(choice, ask)} of {ask.prompt_tokens} prompt tokens to compute{doubt}"
        f"{_fetch(prediction.fetch)}; "
        f"first token in {prediction.ttft * 1e3:.1f} ms, handoff {prediction.handoff_gap * 1e3:.1f} ms, "
        f"then {prediction.tpot * 1e3:.2f} ms per token{'' if option else in_words(prefill, decode)}"
    )


def _fetch(plan: FetchPlan | None) -> str:
    if plan is None:
        return ""
    return (
        f", {plan.source.num_blocks} blocks to fetch from {plan.source.engine_id} in {plan.seconds * 1e3:.1f} ms "
        f"rather than compute in {plan.saved_seconds * 1e3:.1f} ms"
    )
