"""The joint choice of prefill engine, decode engine and mode for one request."""

from dataclasses import dataclass
from itertools import product

from pdserve.core.cluster import Candidate, ClusterState, EngineView, Mode, Route
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable

_MAX_ALTERNATIVES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """decode_local_below: a prompt with fewer uncached tokens is computed on the decode engine itself,
    where one step costs less than a handoff."""

    decode_local_below: int = 32


def choose_route(state: ClusterState, uncached_tokens: int, rules: RoutingRules) -> Route:
    """Cheapest candidate by tokens queued ahead; ties go to the lower engine id.

    uncached_tokens is an upper bound on the prompt tokens without KV on the chosen engines. Raises
    Unavailable naming the pool that has no engine ready.
    """
    prefills = _ready(state, Role.PREFILL)
    decodes = _ready(state, Role.DECODE)
    unified = _ready(state, Role.UNIFIED)
    if unified and not (prefills or decodes):
        return _local(unified, uncached_tokens, "the cluster has unified engines only")
    if not decodes:
        raise Unavailable("no decode engine is ready; try again in a few seconds")
    if uncached_tokens < rules.decode_local_below:
        reason = f"{uncached_tokens} uncached tokens are fewer than {rules.decode_local_below}"
        return _local(decodes, uncached_tokens, reason)
    if not prefills:
        raise Unavailable("no prefill engine is ready; try again in a few seconds")
    pairs = sorted(
        product(prefills, decodes),
        key=lambda pair: (
            _pair_cost(pair[0], pair[1], uncached_tokens),
            pair[0].endpoint.engine_id,
            pair[1].endpoint.engine_id,
        ),
    )
    (prefill, decode), others = pairs[0], pairs[1:]
    return Route(
        mode=Mode.DISAGGREGATED,
        prefill=prefill.endpoint,
        decode=decode.endpoint,
        reason="least tokens and sequences queued ahead",
        alternatives=tuple(
            Candidate(
                prefill=p.endpoint.engine_id,
                decode=d.endpoint.engine_id,
                mode=Mode.DISAGGREGATED,
                cost=_pair_cost(p, d, uncached_tokens),
            )
            for p, d in others[:_MAX_ALTERNATIVES]
        ),
    )


def _ready(state: ClusterState, role: Role) -> list[EngineView]:
    return [
        view
        for view in state.engines
        if view.endpoint.role is role
        and view.endpoint.state is EngineState.READY
        and not (view.load and view.load.draining)
    ]


def _local(views: list[EngineView], uncached_tokens: int, reason: str) -> Route:
    ranked = sorted(views, key=lambda view: (_pair_cost(view, view, uncached_tokens), view.endpoint.engine_id))
    best = ranked[0].endpoint
    return Route(
        mode=Mode.DECODE_LOCAL,
        prefill=best,
        decode=best,
        reason=reason,
        alternatives=tuple(
            Candidate(
                prefill=None,
                decode=view.endpoint.engine_id,
                mode=Mode.DECODE_LOCAL,
                cost=_pair_cost(view, view, uncached_tokens),
            )
            for view in ranked[1 : 1 + _MAX_ALTERNATIVES]
        ),
    )


def _pair_cost(prefill: EngineView, decode: EngineView, uncached_tokens: int) -> float:
    """In tokens: prompt tokens ahead in prefill, plus one per sequence that shares every decode step."""
    backlog = prefill.load.backlog_tokens if prefill.load else 0
    sequences = decode.load.running + decode.load.waiting if decode.load else 0
    return uncached_tokens + max(backlog, prefill.booked_tokens) + max(sequences, decode.booked_requests)
