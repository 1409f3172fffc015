"""Whether a request goes to an engine now, waits, or is turned away: decided from what its best route promises.

Pure functions of the route, the views and the rules. Engines serve prompts in the order they get them, so what is sent
early can be overtaken by nobody: a request is sent when the engine of its pool that is free first has hardly anything
ahead of it, and waits in the gateway until then, where it may be overtaken, expire or be cancelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.admission import Rejection
from pdserve.core.cluster import ClusterState, EngineView, Route, RouteAsk, expected_output
from pdserve.core.endpoint import EngineState
from pdserve.router import load

_PATIENCE = 2.0
"""A prompt that takes longer than the target by itself may take so many times that: it never meets the target, and
still must not wait for ever."""

_CONTESTED_STEPS = 0.1
"""Full steps of prompts an engine may have in front of it while several tenants ask: with none, short prompts would be
computed one by one."""
_CREDIT = 0.25
"""Of the target: a burst of a tenant that asks for little is served as if it was alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """ttft, tpot: the targets, in seconds. enabled: False lets everything through at once, within tenants' limits.

    headroom: share of ttft that a predicted wait may use up, because predictions err. max_waiting: requests of one
    tenant that may wait. steps_ahead: full steps of prompts an engine may have in front of it when it is sent more;
    with none, short prompts would be computed one by one; more makes everybody wait for whoever sends most.
    """

    enabled: bool = True
    ttft: float = 10.0
    tpot: float = 1.0
    headroom: float = 0.8
    max_waiting: int = 256
    steps_ahead: float = 0.25

    @property
    def credit(self) -> float:
        """Seconds of one engine that a tenant which asked for less than its share may take before its time."""
        return _CREDIT * self.ttft


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What awaits a request that is sent now. Times in seconds.

    own: from the start of its prompt to its first token. work: of that, computing; what its tenant is charged.
    queue: until its prompt starts. idle_in: until the engine of the pool that is free first may be sent more. step:
    what a full step of prompts takes there. engines: those that share the pool's prompts. full: no engine has room for
    its tokens. slow: because of what runs beside it, its tokens would come later than the target.
    """

    own: float
    work: float
    queue: float
    idle_in: float
    step: float
    engines: int
    full: bool
    slow: bool

    def goes(self, *, owed: bool = False) -> bool:
        """owed: its tenant has had less than its share, so it goes beside what runs instead of behind it."""
        patience = self.step if owed else 0.0
        return self.idle_in <= patience and not self.full and not self.slow


@dataclass(frozen=True, slots=True)
class Verdict:
    """wait: predicted, in seconds. rejection: None to let it wait; else it may be tried again after so many seconds."""

    wait: float
    rejection: Rejection | None = None
    retry_after: float = 0.0


def look_ahead(
    ask: RouteAsk, route: Route, state: ClusterState, rules: AdmissionRules, *, contested: bool = False
) -> Outlook:
    """Both engines of the route must be in state. contested: other tenants ask as well."""
    views = {view.key: view for view in state.engines}
    prefill = views[route.prefill.engine_id, route.prefill.epoch]
    decode = views[route.decode.engine_id, route.decode.epoch]
    peers = _peers(prefill, state)
    idle_in, step = _first_idle(peers, state.now, rules, contested)
    queue = _queue(prefill, state.now)
    cached = ask.prompt_tokens - route.uncached_tokens
    work = load.prompt_seconds(prefill.step_model, prefill.capacity, ask.prompt_tokens, cached)
    expected = route.prediction.ttft - queue if route.prediction else work
    more = ask.prompt_tokens + expected_output(ask.max_tokens)
    return Outlook(
        own=max(0.0, expected),
        work=work,
        queue=queue,
        idle_in=idle_in,
        step=step,
        engines=len(peers),
        full=all(load.requests(peer) > 0 and load.is_full(peer, more) for peer in _peers(decode, state)),
        slow=_is_slow(ask, decode, rules),
    )


def busy_for(
    route: Route, then: ClusterState, state: ClusterState, rules: AdmissionRules, *, contested: bool, owed: bool
) -> float | None:
    """Seconds for which a request that was to go this way, by the state then, would find all engines of its pool busy,
    however it was routed; None when it may be its turn, or there are other engines since. owed as in Outlook.goes."""
    if state.bypass_below != then.bypass_below or not _same_engines(then, state):
        return None
    prefill = next(view for view in state.engines if view.key == route.prefill.key)
    idle_in, step = _first_idle(_peers(prefill, state), state.now, rules, contested)
    return idle_in if idle_in > (step if owed else 0.0) else None


def judge(outlook: Outlook, rules: AdmissionRules, *, ahead: float, pace: float, timeout: float) -> Verdict:
    """Of a request that cannot go at once. ahead: seconds of prompts that would go first. pace: seconds in which its
    turn would come as far as its tenant's last turns tell. timeout: seconds its client still waits."""
    wait = max(max(0.0, outlook.idle_in) + ahead / outlook.engines, pace)
    limit = max(rules.headroom * rules.ttft - outlook.own, (_PATIENCE - 1) * outlook.own)
    if wait > limit:
        return Verdict(wait, Rejection.TTFT, wait - limit)
    if wait + outlook.own > timeout:
        return Verdict(wait, Rejection.DEADLINE, wait + outlook.own - timeout)
    return Verdict(wait)


def _same_engines(then: ClusterState, now: ClusterState) -> bool:
    """In number, in role and in condition."""
    return then.engines is now.engines or [v.endpoint for v in then.engines] == [v.endpoint for v in now.engines]


def _first_idle(peers: Sequence[EngineView], now: float, rules: AdmissionRules, contested: bool) -> tuple[float, float]:
    """As in Outlook: idle_in and step."""
    return min((_idle_in(peer, now, rules, contested), _step(peer)) for peer in peers)


def _peers(view: EngineView, state: ClusterState) -> list[EngineView]:
    """The engines that could have been chosen in its stead."""
    return [
        peer
        for peer in state.engines
        if peer is view or (peer.endpoint.role is view.endpoint.role and peer.endpoint.state is EngineState.READY)
    ]


def _queue(view: EngineView, now: float) -> float:
    return load.backlog_tokens(view, now) * load.seconds_per_prompt_token(view)


def _idle_in(view: EngineView, now: float, rules: AdmissionRules, contested: bool) -> float:
    """While others ask as well, a prompt counts in full until it is computed: predictions err, and what is sent too
    early shares the steps of whoever comes next."""
    if not contested:
        return _queue(view, now) - rules.steps_ahead * _step(view)
    pending = view.booked.prompt_tokens * load.seconds_per_prompt_token(view)
    return max(_queue(view, now), pending) - _CONTESTED_STEPS * _step(view)


def _step(view: EngineView) -> float:
    return load.seconds_per_prompt_token(view) * load.tokens_per_step(view.capacity)


def _is_slow(ask: RouteAsk, decode: EngineView, rules: AdmissionRules) -> bool:
    """Waiting helps only where the target can be met without the others."""
    rows, context = load.beside(decode, ask.prompt_tokens, expected_output(ask.max_tokens))
    model = decode.step_model
    together = model.seconds(rows + 1, context + ask.prompt_tokens)
    return model.seconds(1, ask.prompt_tokens) <= rules.tpot < together
