"""What the scaler is told of the load: sums and samples since the last report, and how each engine is doing.

Gateways make these (dispatch.demand); several of them add up. Values are plain, so that they travel as JSON.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import EngineState, Role

MOST_SAMPLES = 2000
"""Of one kind in one report; of more, the latest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """How long a request's first token took from its arrival, and how long its prompt takes by itself. still: it has
    not come yet."""

    seconds: float
    own: float
    still: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptClass:
    """Prompts of at most this many uncached tokens and more than half of it, or fewer: how many, and what computing
    them takes one engine in seconds; squares: the sum of those seconds squared."""

    tokens: int
    requests: int
    seconds: float
    squares: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One engine. waiting and fetching as in LoadSnapshot. backlog_seconds: of prompts ahead of a new one.
    busy_seconds: in steps since it started. kv_used, kv_reserved (used, or promised to requests, which are computed
    elsewhere as yet, if that is more) and kv_total in tokens; kv_total, max_rows and step_tokens are 0 until it has
    told."""

    engine_id: str
    role: Role
    state: EngineState
    running: int = 0
    waiting: int = 0
    fetching: int = 0
    backlog_seconds: float = 0.0
    busy_seconds: float = 0.0
    kv_used: int = 0
    kv_reserved: int = 0
    kv_total: int = 0
    max_rows: int = 0
    step_tokens: int = 0
    step: StepModel = field(default_factory=StepModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The time since the last report of the same gateway, in seconds, and what happened in it.

    prompts: of requests sent to engines. ended: answers that came to an end, their tokens, the tokens of prompt and
    half the answer (what a step reads on average), the seconds each had a row of its engine, and those times its KV in
    tokens. tpots: from the second token on. held: requests at the gate now, and their prompt work in seconds. knocking:
    of those, requests that wait because there is no engine.
    """

    seconds: float
    arrivals: int = 0
    prompts: tuple[PromptClass, ...] = ()
    ended: int = 0
    output_tokens: int = 0
    context_tokens: int = 0
    row_seconds: float = 0.0
    kv_token_seconds: float = 0.0
    first_tokens: tuple[FirstToken, ...] = ()
    handoff_gaps: tuple[float, ...] = ()
    tpots: tuple[float, ...] = ()
    held: int = 0
    held_seconds: float = 0.0
    knocking: int = 0
    engines: tuple[EngineFacts, ...] = ()


def together(demands: Iterable[Demand]) -> Demand | None:
    """Of several gateways, over the same time. Of each engine the last word counts. None of none."""
    total: Demand | None = None
    for demand in demands:
        total = demand if total is None else _sum(total, demand, max(total.seconds, demand.seconds))
    return total


def one_after_another(demands: Iterable[Demand]) -> Demand | None:
    """Of one source, over consecutive times; what stands now is the last one's."""
    total: Demand | None = None
    for demand in demands:
        if total is None:
            total = demand
        else:
            stands = {name: getattr(demand, name) for name in ("held", "held_seconds", "knocking", "engines")}
            firsts = tuple(first for first in total.first_tokens if not first.still)
            whole = _sum(replace(total, first_tokens=firsts), demand, total.seconds + demand.seconds)
            total = replace(whole, **stands)
    return total


def bounded(demand: Demand) -> Demand:
    """With no more samples of a kind than one report may have."""
    return replace(
        demand,
        first_tokens=demand.first_tokens[-MOST_SAMPLES:],
        handoff_gaps=demand.handoff_gaps[-MOST_SAMPLES:],
        tpots=demand.tpots[-MOST_SAMPLES:],
    )


def _sum(one: Demand, other: Demand, seconds: float) -> Demand:
    engines = {facts.engine_id: facts for facts in (*one.engines, *other.engines)}
    return Demand(
        seconds=seconds,
        arrivals=one.arrivals + other.arrivals,
        prompts=_merged((*one.prompts, *other.prompts)),
        ended=one.ended + other.ended,
        output_tokens=one.output_tokens + other.output_tokens,
        context_tokens=one.context_tokens + other.context_tokens,
        row_seconds=one.row_seconds + other.row_seconds,
        kv_token_seconds=one.kv_token_seconds + other.kv_token_seconds,
        first_tokens=one.first_tokens + other.first_tokens,
        handoff_gaps=one.handoff_gaps + other.handoff_gaps,
        tpots=one.tpots + other.tpots,
        held=one.held + other.held,
        held_seconds=one.held_seconds + other.held_seconds,
        knocking=one.knocking + other.knocking,
        engines=tuple(engines.values()),
    )


def _merged(classes: Iterable[PromptClass]) -> tuple[PromptClass, ...]:
    by_size: dict[int, PromptClass] = {}
    for each in classes:
        known = by_size.get(each.tokens)
        by_size[each.tokens] = (
            each
            if known is None
            else PromptClass(
                tokens=each.tokens,
                requests=known.requests + each.requests,
                seconds=known.seconds + each.seconds,
                squares=known.squares + each.squares,
            )
        )
    return tuple(by_size[tokens] for tokens in sorted(by_size))
