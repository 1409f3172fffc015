"""Running requests that were asked to move to another engine: the source's end of a migration."""

from collections.abc import Callable

from pdserve.core.errors import EngineDied, LeaseExpired, PdserveError, Unavailable
from pdserve.core.failpoints import reach
from pdserve.core.ticket import Departure
from pdserve.engine.core import EngineCore
from pdserve.engine.core_events import HandedOver, Outgrown
from pdserve.engine.handoff_source import HandoffSource

AnswerDeparture = Callable[[Departure | PdserveError], None]
_ENGINE_ENDS = (EngineDied.code, Unavailable.code)
"""What requests end with that end with their engine."""


class Departures:
    """Who was asked leaves behind its next token, or never: then it has ended here. Of several asks the last is
    answered, once."""

    def __init__(self, core: EngineCore, source: HandoffSource) -> None:
        self._core = core
        self._source = source
        self._asked: dict[int, tuple[str, AnswerDeparture]] = {}

    def ask(self, sequence_id: int, request_id: str, answer: AnswerDeparture) -> None:
        # An earlier ask was given up, and an answer to it would be taken for one to this.
        self._asked[sequence_id] = request_id, answer

    def emitted(self, sequence_id: int) -> None:
        """The sequence has a new token: if it is asked to, it may leave behind it."""
        asked = self._asked.get(sequence_id)
        if asked is None:
            return
        departing = self._core.depart(sequence_id)
        if departing is None:
            return
        self._source.withdraw(sequence_id, "it leaves with another ticket")
        del self._asked[sequence_id]
        request_id, answer = asked
        ticket = self._source.issue(
            departing.ticket_id,
            sequence_id,
            request_id,
            departing.num_tokens,
            departing.source_blocks,
            departing.growth,
        )
        self._source.computed(sequence_id, departing.num_tokens)
        reach("departing")
        answer(Departure(ticket=ticket, output_token_ids=departing.output_token_ids))

    def over(self, event: HandedOver | Outgrown) -> None:
        """A sequence that was leaving has left, or stays."""
        if isinstance(event, Outgrown):
            self._source.withdraw(event.sequence_id, "the sequence outgrew its ticket before it was fetched")
            return
        reach("stopped")
        self._source.handed_over(event.sequence_id, event.num_tokens, event.token_ids, event.source_blocks)

    def ended(self, sequence_id: int, error: tuple[str, str] | None = None) -> None:
        """The sequence is gone from this engine, perhaps handed over, perhaps with an error (code, message). Where that
        is the engine's own end, the request may go on elsewhere: then it was not cancelled."""
        if asked := self._asked.pop(sequence_id, None):
            asked[1](Unavailable(f"{asked[0]} ended where it was"))
        if error and error[0] in _ENGINE_ENDS:
            self._source.withdraw(sequence_id, error[1], LeaseExpired.code)
        else:
            self._source.withdraw(sequence_id, "the request ended at its source")
