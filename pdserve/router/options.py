"""Which ways a request may go at all; which of them is best is a policy's business."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from operator import attrgetter

from pdserve.core.cluster import ClusterState, EngineView, Mode, RouteAsk, expected_output
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.router.load import is_full, leased_share, max_len
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import may_carry

Views = tuple[EngineView, ...]
_BY_ID = attrgetter("endpoint.engine_id")


@dataclass(frozen=True, slots=True)
class LocalOption:
    """One engine does prompt and tokens. short: the prompt has so little left to compute there that this is
    preferred to a handoff."""

    view: EngineView
    mode: Mode
    reason: str
    short: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """prefills and decodes are those that may take part in a handoff, joined tells which goes with which; pairs
    is False when there are none."""

    prefills: Views
    decodes: Views
    local: tuple[LocalOption, ...]
    rules: RoutingRules

    @property
    def pairs(self) -> bool:
        return bool(self.prefills and self.decodes)

    def joined(
        self, prefills: Sequence[EngineView], decodes: Sequence[EngineView]
    ) -> list[tuple[EngineView, EngineView]]:
        """The pairs of these engines that may hand over; of all there are when none of these may."""
        return _linked(prefills, decodes, self.rules) or _linked(self.prefills, self.decodes, self.rules)


def ready_engines(ask: RouteAsk, state: ClusterState, role: Role, room: float = 0.0) -> Views:
    """Engines of a role that may get the request, in the order of their ids; room as in max_len."""
    ready = (
        view
        for view in state.engines
        if view.endpoint.role is role
        and max_len(view) >= room
        and view.endpoint.state is EngineState.READY
        and not (view.load and view.load.draining)
        and view.key not in ask.excluded
    )
    return tuple(sorted(ready, key=_BY_ID))


def alike(ask: RouteAsk, views: Views) -> Views:
    """Those that round as the request has been rounded, or all if none does."""
    same = tuple(view for view in views if view.numerics == ask.numerics) if ask.numerics else ()
    return same or views


def answer_room(ask: RouteAsk, state: ClusterState) -> float:
    """As many tokens as the answer may come to with its prompt, or as an engine that is there to decode can have."""
    return _answer_room(ask, _longest(state), Role.DECODE, Role.UNIFIED)


def _answer_room(ask: RouteAsk, longest: Mapping[Role, float], *roles: Role) -> float:
    return min(ask.prompt_tokens + ask.max_tokens, max((longest[r] for r in roles if r in longest), default=inf))


def _longest(state: ClusterState) -> dict[Role, float]:
    """By role, most tokens a sequence can have at an engine, ready or not, that has told."""
    longest: dict[Role, float] = {}
    for view in state.engines:
        if view.capacity and (tokens := max_len(view)) > longest.get(view.endpoint.role, 0):
            longest[view.endpoint.role] = tokens
    return longest


def find_options(ask: RouteAsk, state: ClusterState, rules: RoutingRules) -> Options:
    """Raises Unavailable naming what is missing when nothing else is allowed."""
    longest = _longest(state)
    prompt_room = min(ask.prompt_tokens + 1, longest.get(Role.PREFILL, inf))
    room = _answer_room(ask, longest, Role.DECODE, Role.UNIFIED)
    prefills = _below_watermark(alike(ask, ready_engines(ask, state, Role.PREFILL, prompt_room)), rules)
    decodes = alike(ask, ready_engines(ask, state, Role.DECODE, room))
    local = [
        LocalOption(view, Mode.DECODE_LOCAL, "this engine does prompts and tokens")
        for view in alike(ask, ready_engines(ask, state, Role.UNIFIED, room))
    ]
    below = max(rules.decode_local_below, state.bypass_below)
    local += _short(ask, decodes, below)
    sources, targets = _pairable(ask, prefills, decodes, rules)
    if rules.fallback:
        whole = _answer_room(ask, longest, *Role)
        alone = tuple(view for view in prefills if max_len(view) >= whole)
        local += _fallback(ask, prefills, alone, decodes, rules, below, paired=bool(sources))
    options = Options(sources, targets, tuple(local), rules)
    if not options.pairs and not local:
        raise Unavailable(f"{_missing(prefills, decodes, rules)}; try again in a few seconds")
    return options


def _missing(prefills: Views, decodes: Views, rules: RoutingRules) -> str:
    if prefills and decodes:
        return "no decode engine can fetch from a prefill engine" + _of_its_domain(rules)
    return f"no {'prefill' if decodes else 'decode'} engine is ready"


def _of_its_domain(rules: RoutingRules) -> str:
    return " of its domain" if rules.topology == "required" else ""


def _pairable(ask: RouteAsk, prefills: Views, decodes: Views, rules: RoutingRules) -> tuple[Views, Views]:
    """The engines of each pool that have a link to one of the other. Those the request was parted from come into
    question only where nothing else is allowed."""
    for parted in (ask.parted,) if rules.fallback else (ask.parted, frozenset()):
        left = tuple(view for view in prefills if view.key not in parted)
        right = tuple(view for view in decodes if view.key not in parted)
        if left and right and rules.topology != "required" and not any(view.lost_links for view in right):
            return left, right
        sources = tuple(p for p in left if any(may_carry(p, d, rules) for d in right))
        targets = tuple(d for d in right if any(may_carry(p, d, rules) for p in left))
        if sources:
            return sources, targets
    return (), ()


def _linked(
    prefills: Sequence[EngineView], decodes: Sequence[EngineView], rules: RoutingRules
) -> list[tuple[EngineView, EngineView]]:
    return [(p, d) for p, d in product(prefills, decodes) if may_carry(p, d, rules)]


def _below_watermark(prefills: Views, rules: RoutingRules) -> Views:
    return tuple(view for view in prefills if leased_share(view) < rules.leased_watermark) or prefills


def _short(ask: RouteAsk, decodes: Views, below: int) -> list[LocalOption]:
    return [
        LocalOption(
            view, Mode.DECODE_LOCAL, f"{ask.uncached(view.key)} uncached tokens are fewer than {below}", short=True
        )
        for view in decodes
        if ask.uncached(view.key) < below
    ]


def _fallback(
    ask: RouteAsk, prefills: Views, alone: Views, decodes: Views, rules: RoutingRules, below: int, *, paired: bool
) -> list[LocalOption]:
    """alone: the prefill engines that have room for the whole answer. below: as _short has taken it."""
    if paired:
        more = ask.prompt_tokens + expected_output(ask.max_tokens)
        if all(is_full(view, more) for view in decodes):
            return [LocalOption(view, Mode.PREFILL_LOCAL, "every decode engine is full") for view in alone]
        return []
    long = [view for view in decodes if ask.uncached(view.key) >= below]
    if not prefills:
        return [LocalOption(view, Mode.DECODE_LOCAL, "no prefill engine is ready") for view in long]
    if not decodes:
        return [LocalOption(view, Mode.PREFILL_LOCAL, "no decode engine is ready") for view in alone]
    reason = "no link for a handoff works" if not _of_its_domain(rules) else "no handoff within a domain is possible"
    return [
        *(LocalOption(view, Mode.DECODE_LOCAL, reason) for view in long),
        *(LocalOption(view, Mode.PREFILL_LOCAL, reason) for view in alone),
    ]
