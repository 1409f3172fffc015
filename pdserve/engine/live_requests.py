"""The requests an engine serves, and what becomes of the core's events for each."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pdserve.core.endpoint import Endpoint
from pdserve.core.failpoints import reach
from pdserve.core.request import FinishReason
from pdserve.core.ticket import TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.engine.core_events import (
    Computed,
    CoreEvent,
    Emitted,
    FetchAborted,
    FetchReady,
    Finished,
    HandedOver,
    HandoffScheduled,
    Outgrown,
    RestoreReady,
    SaveReady,
)
from pdserve.engine.deltas import engine_trace, to_delta
from pdserve.engine.departures import Departures
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.handoff_target import FetchOutcome, HandoffTarget
from pdserve.engine.restoring import Restoring

EngineItem = TokenDelta | TransferTicket
Sink = Callable[[list[EngineItem]], None]
"""Takes what a step produced for one client; must not block."""


@dataclass(slots=True)
class _Live:
    """A request from start until its last delta has gone to its sink."""

    request_id: str
    sink: Sink
    handoff: bool
    last: TokenDelta | None = None
    """Held back until the core's Finished brings the trace that travels with it."""
    outcome: FetchOutcome | None = None


class LiveRequests:
    """By sequence id. on_ended is called after the last item of each."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        source: HandoffSource,
        target: HandoffTarget,
        departures: Departures,
        restoring: Restoring,
        on_ended: Callable[[], None],
    ) -> None:
        self._endpoint = endpoint
        self._source = source
        self._target = target
        self._departures = departures
        self._restoring = restoring
        self._on_ended = on_ended
        self._live: dict[int, _Live] = {}
        self._by_request: dict[str, int] = {}
        self._aborted_fetches: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def ids(self) -> Sequence[int]:
        return tuple(self._live)

    def add(self, sequence_id: int, request_id: str, sink: Sink, *, handoff: bool) -> None:
        self._live[sequence_id] = _Live(request_id, sink, handoff)
        self._by_request[request_id] = sequence_id

    def id_of(self, request_id: str) -> int | None:
        """None for a request that is not here, or has ended."""
        return self._by_request.get(request_id)

    def is_handoff(self, sequence_id: int) -> bool:
        return self._live[sequence_id].handoff

    def fetched(self, sequence_id: int, outcome: FetchOutcome) -> bool:
        """How its fetch went is kept for its trace; False when it has ended."""
        if live := self._live.get(sequence_id):
            live.outcome = outcome
        return live is not None

    def take_aborted(self, sequence_id: int) -> tuple[int, ...] | None:
        """Target blocks that the core quarantined when it gave up a fetch, once, when the fetch's outcome says which
        may still be written."""
        return self._aborted_fetches.pop(sequence_id, None)

    def apply(self, events: list[CoreEvent]) -> None:
        """Give the core's events their effects; each sink is called once."""
        out: dict[Sink, list[EngineItem]] = defaultdict(list)
        for event in events:
            match event:
                case Emitted():
                    self._on_emitted(event, out)
                case HandoffScheduled():
                    self._on_handoff_scheduled(event, out)
                case Computed():
                    self._source.computed(event.sequence_id, event.num_tokens, event.source_blocks)
                    reach("prefilling")
                case HandedOver() | Outgrown():
                    self._departures.over(event)
                case FetchReady():
                    self._target.fetch(event.sequence_id, dict(event.fetch_blocks))
                case FetchAborted():
                    self._aborted_fetches[event.sequence_id] = event.block_ids
                case RestoreReady():
                    self._restoring.restore(event)
                case SaveReady():
                    self._restoring.save(event)
                case Finished():
                    self._on_finished(event, out)
        for sink, items in out.items():
            sink(items)

    def _on_emitted(self, event: Emitted, out: dict[Sink, list[EngineItem]]) -> None:
        live = self._live[event.sequence_id]
        reason = event.finish_reason
        if event.token_ids:
            reach("first_token" if event.index == 0 else "decoding")
        if live.handoff and event.token_ids:
            self._source.prefilled(event.sequence_id, event.token_ids[0], finished=reason is not None)
            reason = reason or FinishReason.HANDOFF
        delta = to_delta(event, reason)
        if reason:
            live.last = delta
        else:
            out[live.sink].append(delta)
            self._departures.emitted(event.sequence_id)

    def _on_handoff_scheduled(self, event: HandoffScheduled, out: dict[Sink, list[EngineItem]]) -> None:
        ticket = self._source.issue(
            event.ticket_id, event.sequence_id, event.request_id, event.num_tokens, event.source_blocks
        )
        self._source.computed(event.sequence_id, event.num_cached_tokens)
        out[self._live[event.sequence_id].sink].append(ticket)
        reach("leased")

    def _on_finished(self, event: Finished, out: dict[Sink, list[EngineItem]]) -> None:
        live = self._live.pop(event.sequence_id)
        self._departures.ended(event.sequence_id, live.last.error if live.last else None)
        self._target.cancel(event.sequence_id)
        fetch = self._restoring.forget(event.sequence_id)
        del self._by_request[live.request_id]
        if live.last:
            trace = engine_trace(self._endpoint, event, live.outcome, fetch)
            out[live.sink].append(msgspec.structs.replace(live.last, trace=trace))
        self._on_ended()
