"""The few engines of many that come into question for a request, so that candidates are priced exactly of those alone.

Costs are estimated of all engines at once as router.cost prices them, but as if all links were as fast as one another,
and every running answer as long as the horizon. On the list are the cheapest of each role, and those that have
announced most of the prompt: sources of a fetch, whether or not they may get the request.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, compress
from operator import is_not

import numpy as np
from numpy.typing import NDArray

from pdserve.core.cluster import (
    FETCH_SECONDS,
    OUTPUT_HORIZON,
    RECENT_SECONDS,
    ClusterState,
    EngineKey,
    EngineView,
    RouteAsk,
    expected_output,
)
from pdserve.core.endpoint import EngineState, Role
from pdserve.router import load
from pdserve.router.rendezvous import engine_bits, name_bits, turns
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import may_carry

Floats = NDArray[np.float64]

_MORE = 2
"""Of each role so many more engines than pool_top are listed: estimates are not exact."""
_NEAR = 2
"""So many engines of each role are listed for each domain that one on the list is in."""
_NOWHERE = -1.0
"""The domain of an engine that names none."""
_LAST = 1e9
"""Seconds added to the cost of engines that come into question only where no others do."""
_COLUMN_NAMES = (
    "ready",
    "busy_until",
    "behind",
    "base",
    "per_token",
    "per_context",
    "step",
    "crowding",
    "alone",
    "context",
    "lacking_rows",
    "room",
    "reserved",
    "late",
    "max_len",
    "domain",
)


class Shortlist:
    """Keeps what it knows of each engine until its view changes, so that a request costs what has changed."""

    def __init__(self, rules: RoutingRules) -> None:
        self._rules = rules
        self._views: tuple[EngineView, ...] = ()
        self._rows: dict[EngineKey, int] = {}
        self._table: Floats = np.zeros((0, 0))
        self._columns: dict[str, Floats] = {}
        """The table's, by name."""
        self._lengths = 0.0, 0.0
        """The least of them in the table, and the greatest: most tokens a sequence may have."""
        self._roles: dict[Role, NDArray[np.intp]] = {}
        self._bits = np.empty(0, np.uint64)
        self._domains: dict[str, int] = {}

    def of(self, ask: RouteAsk, state: ClusterState) -> ClusterState:
        """The state with the listed engines alone; unchanged where there are few, where none of those on the list can
        hand over to one another, or where the request has lost a link or is to stay among engines that round alike."""
        if len(state.engines) <= 4 * self._rules.pool_top or ask.parted or ask.numerics:
            return state
        self._follow(state.engines)
        rows = sorted(self._listed(ask, state.now))
        few = tuple(state.engines[row] for row in rows)
        return replace(state, engines=few) if _joined(few, self._rules) else state

    def _follow(self, views: tuple[EngineView, ...]) -> None:
        """Take in what has changed since the last request."""
        if len(views) != len(self._views):
            self._views = ()
        changed = (
            list(compress(range(len(views)), map(is_not, views, self._views))) if self._views else range(len(views))
        )
        if not self._views or any(_place(views[row]) != _place(self._views[row]) for row in changed):
            self._begin(views)
            changed = range(len(views))
        if changed:
            values = ((*_values(views[row], self._rules), self._number_of(views[row].domain)) for row in changed)
            rows = np.fromiter(chain.from_iterable(values), np.float64).reshape(len(changed), -1)
            self._table[:, list(changed)] = rows.T
            before = self._views
            if not before or any(views[row].capacity is not before[row].capacity for row in changed):
                lengths = self._columns["max_len"]
                self._lengths = float(lengths.min()), float(lengths.max())
        self._views = views

    def _number_of(self, domain: str) -> float:
        """A domain's, among those seen since the router began."""
        return self._domains.setdefault(domain, len(self._domains)) if domain else _NOWHERE

    def _begin(self, views: tuple[EngineView, ...]) -> None:
        """Engines have joined or left, or have taken another role."""
        self._rows = {view.key: row for row, view in enumerate(views)}
        self._table = np.zeros((len(_COLUMN_NAMES), len(views)))
        self._columns = dict(zip(_COLUMN_NAMES, self._table, strict=True))
        self._bits = np.array([engine_bits(view.endpoint.engine_id) for view in views], np.uint64)
        by_role: dict[Role, list[int]] = {}
        for row, view in enumerate(views):
            by_role.setdefault(view.endpoint.role, []).append(row)
        self._roles = {role: np.array(rows, np.intp) for role, rows in by_role.items()}

    def _listed(self, ask: RouteAsk, now: float) -> set[int]:
        # One place more, for engines that hold some of the prompt and are not here.
        held = np.zeros((2, len(self._views) + 1))
        held[:, [self._rows.get(key, -1) for key in ask.hits]] = (
            [hit.likely_tokens for hit in ask.hits.values()],
            [hit.tokens for hit in ask.hits.values()],
        )
        likely, announced = held[:, :-1]
        uncached = ask.prompt_tokens - np.minimum(likely, ask.prompt_tokens - 1)
        ready = self._columns["ready"] > 0
        for key in ask.excluded:
            if (row := self._rows.get(key)) is not None:
                ready[row] = False
        reach = int(min(announced.max(), ask.prompt_tokens - 1))
        prompts, (tokens, full) = self._prompt_costs(ask, uncached, reach, now), self._token_costs(ask)
        handoff = self._rules.gap_weight * self._rules.fetch_seconds_per_token * uncached
        short = self._shorter_than(ask.prompt_tokens + ask.max_tokens)
        costs = {
            Role.PREFILL: prompts + np.maximum(self._columns["late"], self._shorter_than(ask.prompt_tokens + 1)),
            Role.DECODE: tokens + handoff + short,
        }
        if Role.UNIFIED in self._roles:
            costs[Role.UNIFIED] = prompts + tokens + short
        order = turns(name_bits(ask.prompt_name), self._bits)
        listed = self._cheapest((ready & (announced > 0)).nonzero()[0], -announced, order, self._rules.pool_top)
        if (decodes := self._roles.get(Role.DECODE)) is not None:
            # Whether every decode engine is full decides what else may be done, so one with room must not be missed.
            listed |= self._cheapest(decodes[(ready & ~full)[decodes]], costs[Role.DECODE], order, 1)
        for role, pool in self._roles.items():
            listed |= self._cheapest(pool[ready[pool]], costs[role], order, self._rules.pool_top + _MORE)
        return listed | self._neighbours(listed, ready, costs, order)

    def _neighbours(
        self, listed: set[int], ready: NDArray[np.bool_], costs: Mapping[Role, Floats], order: NDArray[np.uint64]
    ) -> set[int]:
        """Of each role the cheapest in the domains of those listed, so that each meets some that are near."""
        domains = self._columns["domain"]
        found: set[int] = set()
        for domain in {domains[row] for row in listed} - {_NOWHERE}:
            there = ready & (domains == domain)
            for role in self._roles.keys() - {Role.UNIFIED}:
                pool = self._roles[role]
                found |= self._cheapest(pool[there[pool]], costs[role], order, _NEAR)
        return found

    def _shorter_than(self, tokens: int) -> Floats | float:
        """_LAST for engines at which a sequence may not have so many tokens, nor as many as at another."""
        least, most = self._lengths
        limit = min(tokens, most)
        return np.where(self._columns["max_len"] < limit, _LAST, 0.0) if least < limit else 0.0

    @staticmethod
    def _cheapest(rows: NDArray[np.intp], costs: Floats, order: NDArray[np.uint64], count: int) -> set[int]:
        if len(rows) > count:
            rows = rows[np.lexsort((order[rows], costs[rows]))[:count]]
        return set(rows.tolist())

    def _prompt_costs(self, ask: RouteAsk, uncached: Floats, reach: int, now: float) -> Floats:
        """As CostModel._prefill_cost; what others have announced, up to reach, may be fetched from them."""
        of, rules = self._columns, self._rules
        queue = np.maximum(of["behind"], of["busy_until"] - now)
        compute = self._compute(ask.prompt_tokens, uncached)
        seconds = compute
        if rules.fetch and reach:
            lacking = np.maximum(0, reach - (ask.prompt_tokens - uncached))
            fetch = (1 + rules.fetch_margin) * (FETCH_SECONDS + rules.fetch_seconds_per_token * lacking)
            seconds = np.minimum(compute, self._compute(ask.prompt_tokens, uncached - lacking) + fetch)
        return rules.ttft_weight * (queue + seconds) + of["crowding"] * compute

    def _compute(self, prompt: int, uncached: Floats) -> Floats:
        """As load.prompt_seconds."""
        of = self._columns
        pairs = (prompt**2 - (prompt - uncached) ** 2) / (2 * of["step"])
        return of["base"] * np.ceil(uncached / of["step"]) + of["per_token"] * uncached + of["per_context"] * pairs

    def _token_costs(self, ask: RouteAsk) -> tuple[Floats, NDArray[np.bool_]]:
        """As CostModel._decode_cost, without a handoff; and which engines have no room."""
        of, rules, prompt, horizon = self._columns, self._rules, ask.prompt_tokens, expected_output(ask.max_tokens)
        tpot = of["alone"] + of["per_context"] * (of["context"] + prompt)
        surplus = (of["reserved"] + prompt + horizon) / of["room"] - 1.0  # room is infinite until an engine has told
        missing = np.maximum(of["lacking_rows"], surplus)
        wait = missing * tpot * horizon
        return rules.gap_weight * wait + rules.tpot_weight * tpot * horizon, missing > 0


def _place(view: EngineView) -> tuple[EngineKey, Role]:
    return view.key, view.endpoint.role


def _joined(views: tuple[EngineView, ...], rules: RoutingRules) -> bool:
    """Whether a handoff between two of them is possible, if they are of both kinds."""
    prefills = [view for view in views if view.endpoint.role is Role.PREFILL]
    decodes = [view for view in views if view.endpoint.role is Role.DECODE]
    return not (prefills and decodes) or any(may_carry(p, d, rules) for d in decodes for p in prefills)


def _values(view: EngineView, rules: RoutingRules) -> tuple[float, ...]:
    """In the order of _COLUMN_NAMES, but for the domain. Seconds as CostModel has them; alone: of a step with one row
    more, without what that row reads."""
    ready = view.endpoint.state is EngineState.READY and not (view.load and view.load.draining)
    model, most = view.step_model, load.max_rows(view)
    rows, context = load.beside(view, 0, OUTPUT_HORIZON)
    behind = view.booked.behind_tokens if view.load else view.booked.prompt_tokens
    utilisation = min(1.0, view.recent_work / RECENT_SECONDS)
    return (
        ready,
        load.busy_until(view),
        behind * load.seconds_per_prompt_token(view),
        model.base,
        model.per_token,
        model.per_context,
        load.tokens_per_step(view.capacity),
        rules.evict_weight * view.kv_filled + rules.spread_weight * utilisation,
        model.base + model.per_token * (rows + 1),
        context,
        max(0, load.requests(view) + 1 - most) / most,
        load.kv_tokens(view) or np.inf,
        load.reserved_tokens(view),
        _LAST if load.leased_share(view) >= rules.leased_watermark else 0.0,
        load.max_len(view),
    )
