"""Measures the load of one gateway for the scaler: what comes, what it costs, how long clients wait."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.core.admission import Rejection
from pdserve.core.clock import Clock
from pdserve.core.cluster import ClusterState, EngineView, Route
from pdserve.core.request import Request
from pdserve.dispatch.ledger import EngineLedger
from pdserve.router import load
from pdserve.scaler.demand import MOST_SAMPLES, Demand, EngineFacts, FirstToken, PromptClass
from pdserve.telemetry.record import RequestRecord

_FOR_LACK_OF_ENGINES = (Rejection.TTFT, Rejection.DEADLINE, Rejection.QUEUE)
_TOO_LATE = 2.0
"""Times the TTFT target."""


@dataclass(slots=True)
class Held:
    """Requests at the gate: how many, the prompt work of those of which it is known, and how many find no engine."""

    requests: int = 0
    seconds: float = 0.0
    knocking: int = 0


def _samples() -> deque[Any]:
    """The latest of one kind; the oldest go, for nobody may ever ask for a report."""
    return deque(maxlen=MOST_SAMPLES)


@dataclass(slots=True)
class _Counts:
    since: float
    arrivals: int = 0
    prompts: dict[int, PromptClass] = field(default_factory=dict)
    ended: int = 0
    output_tokens: int = 0
    context_tokens: int = 0
    row_seconds: float = 0.0
    kv_token_seconds: float = 0.0
    first_tokens: deque[FirstToken] = field(default_factory=_samples)
    handoff_gaps: deque[float] = field(default_factory=_samples)
    tpots: deque[float] = field(default_factory=_samples)


class Metered:
    """One request from its arrival to its end. Times are monotonic seconds."""

    def __init__(self, counts: _Counts, request: Request, clock: Clock) -> None:
        self.counts = counts
        self.arrived = clock.monotonic()
        self.own = 0.0
        self.tokens = 0
        self._request = request
        self._clock = clock
        self._routed = self._second = self._last = 0.0

    def routed(self, route: Route, prefill: EngineLedger | None) -> None:
        """It goes to its engines for the first time. prefill: of the one that computes its prompt; None when that has
        left."""
        self._routed = self._clock.monotonic()
        if prefill is None:
            return
        prompt = len(self._request.prompt_token_ids)
        fetched = route.fetch.tokens if route.fetch else 0
        to_compute = max(1, route.uncached_tokens - fetched)
        self.own = prefill.prompt_seconds(prompt, prompt - to_compute)
        size = 1 << (to_compute - 1).bit_length()
        known = self.counts.prompts.get(size, PromptClass(tokens=size, requests=0, seconds=0.0, squares=0.0))
        self.counts.prompts[size] = replace(
            known,
            requests=known.requests + 1,
            seconds=known.seconds + self.own,
            squares=known.squares + self.own**2,
        )

    def came(self, count: int) -> None:
        """So many tokens came."""
        if not count:
            return
        now = self._clock.monotonic()
        if not self.tokens:
            self.counts.first_tokens.append(FirstToken(seconds=now - self.arrived, own=self.own))
        elif self.tokens == 1:
            self._second = now
            self.counts.handoff_gaps.append(now - self._last)
        self.tokens += count
        self._last = now

    def ended(self, record: RequestRecord) -> None:
        """However it ended. One that was turned away for lack of engines counts as far too late: admission lets in what
        will be in time, so those it lets in tell nothing of the others."""
        admission = record.admission
        if admission and admission.rejection in _FOR_LACK_OF_ENGINES:
            self.counts.first_tokens.append(FirstToken(seconds=_TOO_LATE * admission.ttft_target, own=self.own))
        if not self.tokens:
            return
        self.counts.ended += 1
        self.counts.output_tokens += self.tokens
        context = len(self._request.prompt_token_ids) + self.tokens // 2
        seconds = self._clock.monotonic() - self._routed
        self.counts.context_tokens += context
        self.counts.row_seconds += seconds
        self.counts.kv_token_seconds += context * seconds
        if self._second and self.tokens > 2:
            # From the second token on: the gap before it is no work of the decode engine's.
            self.counts.tpots.append((self._last - self._second) / (self.tokens - 2))


class DemandMeter:
    """Counts between two reports."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts = _Counts(clock.monotonic())
        self._live: dict[Metered, None] = {}

    @contextmanager
    def request(self, request: Request, record: RequestRecord) -> Iterator[Metered]:
        """From arrival to end."""
        metered = Metered(self._counts, request, self._clock)
        self._counts.arrivals += 1
        self._live[metered] = None
        try:
            yield metered
        finally:
            del self._live[metered]
            metered.ended(record)

    def report(self, state: ClusterState, held: Held) -> Demand:
        """What happened since the last one, and what stands."""
        now = self._clock.monotonic()
        counts, self._counts = self._counts, _Counts(now)
        pending = []
        for metered in self._live:
            metered.counts = self._counts
            if not metered.tokens:
                pending.append(FirstToken(seconds=now - metered.arrived, own=metered.own, still=True))
        return Demand(
            seconds=now - counts.since,
            arrivals=counts.arrivals,
            prompts=tuple(counts.prompts[size] for size in sorted(counts.prompts)),
            ended=counts.ended,
            output_tokens=counts.output_tokens,
            context_tokens=counts.context_tokens,
            row_seconds=counts.row_seconds,
            kv_token_seconds=counts.kv_token_seconds,
            first_tokens=(*counts.first_tokens, *pending[:MOST_SAMPLES]),
            handoff_gaps=tuple(counts.handoff_gaps),
            tpots=tuple(counts.tpots),
            held=held.requests,
            held_seconds=held.seconds,
            knocking=held.knocking,
            engines=tuple(_facts(state.engines, state.now)),
        )


def _facts(views: Iterable[EngineView], now: float) -> Iterator[EngineFacts]:
    for view in views:
        report, capacity = view.load, view.capacity
        block = capacity.block_size if capacity else 0
        yield EngineFacts(
            engine_id=view.endpoint.engine_id,
            role=view.endpoint.role,
            state=view.endpoint.state,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            fetching=report.fetching if report else 0,
            backlog_seconds=max(0.0, load.backlog_tokens(view, now) * load.seconds_per_prompt_token(view)),
            busy_seconds=sum(tally.seconds for tally in report.steps) if report else 0.0,
            kv_used=(report.blocks.total - report.blocks.free) * block if report else 0,
            kv_reserved=load.reserved_tokens(view),
            kv_total=capacity.num_blocks * block if capacity else 0,
            max_rows=capacity.max_rows if capacity else 0,
            step_tokens=capacity.max_tokens_per_step if capacity else 0,
            step=view.step_model,
        )
