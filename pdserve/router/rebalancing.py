"""Which decoding request would best go on at another engine, so that load evens out; pure functions of views.

An engine's pressure is what a step takes with all that is there, times what it is short of room: from a high mark of
its KV on, twice that when the KV is full. A request moves from an engine with clearly more pressure to one that has
less with it, if the tokens still expected on both come sooner by more than the move costs.

So nothing moves back and forth: a move leaves no pressure behind that would call anything back, and each lowers the
sum of seconds all answers still take by a least amount, so there are finitely many.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from pdserve.core.cluster import (
    OUTPUT_HORIZON,
    BookedDecode,
    ClusterState,
    EngineKey,
    EngineView,
    RouteAsk,
    StepModel,
)
from pdserve.core.endpoint import Endpoint, Role
from pdserve.router import load
from pdserve.router.options import ready_engines
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import fetch_seconds_per_token, may_carry

_LOOKED_AT = 8
"""Requests of one engine, those first whose moves are cheapest for what is left of them: looks come often."""
_OTHER = BookedDecode(OUTPUT_HORIZON, 0)
"""A request of which this gateway knows nothing."""


class DecodingRequest(NamedTuple):
    """A request that decodes on an engine and may move: what is booked for it there, how much it has written, and how
    many tokens, prompt and output together, it may come to."""

    request_id: str
    engine: EngineKey
    row: BookedDecode
    written: int
    longest: int = 0

    @property
    def kv_tokens(self) -> int:
        """What a move carries."""
        return self.row.context_tokens + self.written

    @property
    def reserved(self) -> int:
        """KV it may grow to."""
        return self.kv_tokens + self.row.expected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """gain: seconds by which all answers there and here end sooner, together; cost: those the move takes."""

    request_id: str
    target: Endpoint
    gain: float
    cost: float
    why: str


@dataclass(frozen=True)
class _Load:
    """What one engine has to do. kv: tokens held or promised, of which it should not exceed mark and cannot room."""

    model: StepModel
    rows: tuple[BookedDecode, ...]
    kv: float
    mark: float
    room: float
    max_rows: int

    @classmethod
    def of(cls, view: EngineView, rules: RoutingRules) -> "_Load":
        others = (_OTHER,) * (view.booked.prefilling + view.others_requests)
        room = load.kv_tokens(view) or 0
        return cls(
            model=view.step_model,
            rows=(*view.booked.decoding, *others),
            kv=load.reserved_tokens(view),
            mark=rules.rebalance_kv * room,
            room=room,
            max_rows=load.max_rows(view),
        )

    def less(self, runner: DecodingRequest) -> "_Load":
        rows = list(self.rows)
        rows.remove(runner.row)
        return replace(self, rows=tuple(rows), kv=max(0.0, self.kv - runner.reserved))

    def more(self, runner: DecodingRequest) -> "_Load":
        return replace(self, rows=(*self.rows, runner.row), kv=self.kv + runner.reserved)

    @property
    def shortage(self) -> float:
        """0 with room for all, 1 when KV is full. What is short of room waits about as long as what runs takes."""
        kv = max(0.0, self.kv - self.mark) / (self.room - self.mark)
        return max(kv, len(self.rows) / self.max_rows - 1)

    @cached_property
    def pressure(self) -> float:
        """Seconds per token at once; more of anything never lowers it."""
        context = sum(row.context_tokens for row in self.rows)
        return self.model.seconds(len(self.rows), context) * (1 + self.shortage)

    @cached_property
    def seconds(self) -> float:
        """Until all that is expected has been written, summed over rows: each token is written in a step with the rows
        that still run by then."""
        rows = sorted(self.rows)
        expected = [row.expected_tokens for row in rows]
        before = accumulate(expected, initial=0)
        total = self.model.base * sum(expected)
        for index, (row, earlier) in enumerate(zip(rows, before, strict=False)):
            # Of each row's tokens those that are written before this one ends.
            beside = earlier + row.expected_tokens * (len(rows) - index)
            total += beside * (self.model.per_token + self.model.per_context * row.context_tokens)
        return total * (1 + self.shortage)


def rebalance(
    runners: Iterable[DecodingRequest], state: ClusterState, rules: RoutingRules, pause: float, since: float
) -> Move | None:
    """The move to make, from the engine under most pressure that has one. Of large pools only the few engines under
    most and least pressure come into question.

    pause: seconds that earlier moves kept their clients waiting. since: when (monotonic) bookings changed last other
    than by requests that came and went; engines that have not reported after it are left alone.
    """
    views = [view for view in _able(state) if view.load_at > since]
    if len(views) < 2:
        return None
    loads = {view.key: _Load.of(view, rules) for view in views}
    by_engine: dict[EngineKey, list[DecodingRequest]] = {}
    for runner in runners:
        by_engine.setdefault(runner.engine, []).append(runner)
    calmest = sorted(views, key=lambda view: (loads[view.key].pressure, view.endpoint.engine_id))
    for source in calmest[::-1][: rules.pool_top]:
        here = loads[source.key]
        if here.pressure <= rules.rebalance_apart * loads[calmest[0].key].pressure:
            break
        linked = [view for view in calmest if view is not source and may_carry(source, view, rules)]
        targets = linked[: rules.pool_top]
        for runner in _cheapest(by_engine.get(source.key, ()), here):
            departing = _Departing(runner, source, here, here.less(runner), pause)
            moves = [departing.to(target, loads[target.key], rules) for target in targets]
            if best := max(filter(None, moves), key=lambda move: move.gain - move.cost, default=None):
                return best
    return None


def _able(state: ClusterState) -> list[EngineView]:
    """Engines that decode and have told what they hold."""
    ask = RouteAsk(request_id="", prompt_tokens=1, max_tokens=1)
    ready = (view for role in (Role.DECODE, Role.UNIFIED) for view in ready_engines(ask, state, role))
    return [view for view in ready if view.load and load.kv_tokens(view)]


def _cheapest(runners: Sequence[DecodingRequest], here: _Load) -> list[DecodingRequest]:
    worth = [runner for runner in runners if runner.row.expected_tokens and runner.row in here.rows]
    worth.sort(key=lambda runner: (runner.kv_tokens / runner.row.expected_tokens, runner.request_id))
    return worth[:_LOOKED_AT]


class _Departing(NamedTuple):
    """A request that might leave, and its engine's load with it and without."""

    runner: DecodingRequest
    source: EngineView
    here: _Load
    left: _Load
    pause: float

    def to(self, target: EngineView, there: _Load, rules: RoutingRules) -> Move | None:
        """None when it is not worth it, or would call something back."""
        joined, apart = there.more(self.runner), rules.rebalance_apart
        needed = joined.shortage == 0 and self.here.pressure > apart * joined.pressure
        if not needed or joined.pressure > apart * self.left.pressure:
            return None
        if load.max_len(target) < min(self.runner.longest, load.max_len(self.source)):
            return None
        if target.numerics != self.source.numerics:
            return None
        gain = self.here.seconds + there.seconds - self.left.seconds - joined.seconds
        per_token = fetch_seconds_per_token(self.source, target, rules)
        cost = self.pause + per_token * self.runner.kv_tokens
        if gain <= (1 + rules.rebalance_margin) * cost + rules.rebalance_seconds:
            return None
        why = (
            f"{self.source.endpoint.engine_id} under pressure of {self.here.pressure * 1e3:.2f} ms per token, "
            f"{target.endpoint.engine_id} of {joined.pressure * 1e3:.2f} ms with it; "
            f"saves all answers {gain:.2f} s, costs {cost:.3f} s"
        )
        return Move(request_id=self.runner.request_id, target=target.endpoint, gain=gain, cost=cost, why=why)
