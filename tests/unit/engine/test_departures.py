"""Requests that are asked to move away from an engine: who hears of it, and which ticket holds."""

import pytest

from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import Cancelled, EngineDied, LeaseExpired, NotANumber, PdserveError, Unavailable
from pdserve.core.ticket import Departure, HandoffDone, RegionReady, TicketGone
from pdserve.engine.core_events import HandedOver
from pdserve.engine.departures import Departures
from tests.unit.engine.test_handoff_source import Bench
from tests.unit.engine.toy import ToyEngine, make_request

Answers = list[Departure | PdserveError]


def decoding() -> tuple[ToyEngine, int, Bench, Departures]:
    """A sequence behind its second token, on an engine with one step in flight."""
    engine = ToyEngine(EngineLimits(depth=1), num_blocks=64, block_size=4)
    sequence_id = engine.add(make_request("a", range(1, 7), max_tokens=30, ignore_eos=True))
    while len(engine.answers[sequence_id].token_ids) < 2:
        assert engine.advance()
    bench = Bench(num_tokens=10)
    return engine, sequence_id, bench, Departures(engine.core, bench.source)


def attached(sequence_id: int, bench: Bench, departures: Departures) -> Answers:
    """The answers to an ask to leave; whoever asked has got a ticket and reads by it."""
    answers: Answers = []
    departures.ask(sequence_id, "a", answers.append)
    departures.emitted(sequence_id)
    (departure,) = answers
    assert isinstance(departure, Departure)
    bench.source.attach(departure.ticket.id, 0, bench.news.append)
    return answers


async def test_whoever_asked_last_is_answered() -> None:
    _, sequence_id, _, departures = decoding()
    first: Answers = []
    second: Answers = []
    departures.ask(sequence_id, "a", first.append)
    departures.ask(sequence_id, "a", second.append)
    departures.emitted(sequence_id)
    departures.ended(sequence_id)
    assert first == []
    assert [type(answer) for answer in second] == [Departure]


async def test_whoever_asked_hears_of_the_end() -> None:
    _, sequence_id, _, departures = decoding()
    answers: Answers = []
    departures.ask(sequence_id, "a", answers.append)
    departures.ended(sequence_id)
    assert [type(answer) for answer in answers] == [Unavailable]


async def test_a_sequence_that_is_asked_again_as_it_stops_is_handed_over_with_the_ticket_it_has() -> None:
    engine, sequence_id, bench, departures = decoding()
    answers = attached(sequence_id, bench, departures)
    engine.submit()
    engine.absorb(engine.core.stop(sequence_id))
    departures.ask(sequence_id, "a", answers.append)
    engine.collect()
    (over,) = [event for event in engine.events(sequence_id) if isinstance(event, HandedOver)]
    departures.emitted(sequence_id)
    departures.over(over)
    departures.ended(sequence_id)
    assert [type(answer) for answer in answers] == [Departure, Unavailable]
    assert [type(news) for news in bench.news if not isinstance(news, RegionReady)] == [HandoffDone]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, Cancelled),
        ((NotANumber.code, "its logits are NaN"), Cancelled),
        ((EngineDied.code, "lost"), LeaseExpired),
        ((Unavailable.code, "shut down"), LeaseExpired),
    ],
)
async def test_a_target_hears_whether_its_source_or_the_request_has_ended(
    error: tuple[str, str] | None, told: type[PdserveError]
) -> None:
    _, sequence_id, bench, departures = decoding()
    attached(sequence_id, bench, departures)
    departures.ended(sequence_id, error)
    assert [news.code for news in bench.news if isinstance(news, TicketGone)] == [told.code]
