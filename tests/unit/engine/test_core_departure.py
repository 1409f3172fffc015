"""A running sequence leaves one core and goes on in another, with the tokens it would have had anyway."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import FinishReason, Request
from pdserve.core.ticket import TransferTicket
from pdserve.dispatch.replay import continued
from pdserve.engine.core_events import Computed, Departing, FetchReady, HandedOver, Outgrown
from pdserve.engine.leave import GROWTH
from tests.unit.engine.tickets import make_ticket
from tests.unit.engine.toy import ToyEngine, make_request, oracle

BLOCK = 4


def make_engine(num_blocks: int = 64, depth: int = 2) -> ToyEngine:
    return ToyEngine(EngineLimits(depth=depth), num_blocks=num_blocks, block_size=BLOCK)


def departed(engine: ToyEngine, sequence_id: int, num_tokens: int) -> Departing | None:
    """Decode so many tokens, then ask to leave; None when it cannot (any more)."""
    answer = engine.answers[sequence_id]
    while len(answer.token_ids) < num_tokens and engine.advance():
        pass
    return engine.core.depart(sequence_id)


def stop(engine: ToyEngine, sequence_id: int) -> HandedOver | None:
    """Let it stop; None when it ended by itself before."""
    engine.absorb(engine.core.stop(sequence_id))
    while not engine.answers[sequence_id].finished:
        assert engine.advance(), "it neither stopped nor goes on"
    return next((event for event in engine.events(sequence_id) if isinstance(event, HandedOver)), None)


def resume(engine: ToyEngine, source: ToyEngine, request: Request, leaving: Departing, end: HandedOver) -> int:
    """What a gateway and a transfer do: submit the rest, copy the KV, say what was sampled meanwhile."""
    rest = continued(request, leaving.output_token_ids, "moved")
    plain = make_ticket(rest, block_size=BLOCK)
    ticket = TransferTicket(**{name: getattr(plain, name) for name in plain.__slots__} | {"growth": leaving.growth})
    sequence_id = engine.add(rest, ticket=ticket)
    engine.submit()
    (ready,) = [event for event in engine.events(sequence_id) if isinstance(event, FetchReady)]
    for index, block in ready.fetch_blocks.items():
        if index < len(end.source_blocks):
            engine.device.write_block(block, source.device.block(end.source_blocks[index]))
    engine.absorb(engine.core.fetched(sequence_id, end.token_ids))
    engine.run()
    return sequence_id


@settings(max_examples=150)
@given(
    prompt=st.lists(st.integers(1, 39), min_size=1, max_size=11),
    before=st.integers(1, 12),
    meanwhile=st.integers(0, 12),
    max_tokens=st.integers(8, 40),
    min_tokens=st.integers(0, 8),
    depth=st.sampled_from((1, 2)),
)
def test_wherever_it_leaves_and_stops_the_answer_is_the_same(
    prompt: list[int], before: int, meanwhile: int, max_tokens: int, min_tokens: int, depth: int
) -> None:
    request = make_request("a", prompt, max_tokens=max_tokens, min_tokens=min_tokens)
    expected, reason = oracle(request)
    here, there = make_engine(depth=depth), make_engine(depth=depth)
    there.add(make_request("other", [*prompt, 1, 2, 3]))
    there.run()
    sequence_id = here.add(request)
    leaving = departed(here, sequence_id, before)
    for _ in range(meanwhile):
        here.advance()
    end = stop(here, sequence_id) if leaving else None
    answer = here.answers[sequence_id]
    if leaving is None or end is None:
        here.run()
        assert (tuple(answer.token_ids), answer.finish_reason) == (expected, reason)
        return
    assert answer.finish_reason is FinishReason.HANDOFF
    moved = there.answers[resume(there, here, request, leaving, end)]
    assert (*answer.token_ids, *moved.token_ids) == expected
    assert moved.finish_reason == reason
    assert moved.first_index == len(answer.token_ids) - len(leaving.output_token_ids)
    assert here.core.kv.counts().leased == len(set(end.source_blocks))
    here.absorb(here.core.lease_ended(leaving.ticket_id, sequence_id))
    here.assert_idle()
    there.assert_idle()


def leaving_engine(num_tokens: int = 2, max_tokens: int = 60) -> tuple[ToyEngine, int, Departing]:
    engine = make_engine()
    request = make_request("a", range(1, 7), max_tokens=max_tokens, ignore_eos=True)
    sequence_id = engine.add(request)
    leaving = departed(engine, sequence_id, num_tokens)
    assert leaving is not None
    return engine, sequence_id, leaving


def test_blocks_are_leased_before_they_are_offered_and_offered_once_they_are_full() -> None:
    engine, sequence_id, leaving = leaving_engine()
    for _ in range(30):
        engine.advance()
    offers = [event for event in engine.events(sequence_id) if isinstance(event, Computed)]
    assert offers
    for offer in offers:
        assert offer.num_tokens // BLOCK <= len(offer.source_blocks)
    assert [offer.num_tokens // BLOCK for offer in offers] == list(range(2, 2 + len(offers)))
    assert engine.core.kv.counts().leased == len(offers[-1].source_blocks)
    assert offers[-1].source_blocks[: len(leaving.source_blocks)] == leaving.source_blocks


def test_it_decodes_on_until_it_is_stopped_and_no_step_longer() -> None:
    engine, sequence_id, _ = leaving_engine()
    for _ in range(6):
        engine.advance()
    known = len(engine.answers[sequence_id].token_ids)
    assert known > 2
    in_flight = engine.core.in_flight
    assert stop(engine, sequence_id) is not None
    assert len(engine.answers[sequence_id].token_ids) == known + in_flight


def test_a_sequence_whose_ticket_ended_stays() -> None:
    engine, sequence_id, leaving = leaving_engine(max_tokens=20)
    engine.absorb(engine.core.lease_ended(leaving.ticket_id, sequence_id))
    assert engine.core.kv.counts().leased == 0
    engine.absorb(engine.core.stop(sequence_id))
    engine.run()
    assert engine.answers[sequence_id].finish_reason is FinishReason.LENGTH
    engine.assert_idle()


def test_even_when_it_was_about_to_stop() -> None:
    engine, sequence_id, leaving = leaving_engine(max_tokens=20)
    while not engine.core.in_flight:
        engine.advance()
    engine.absorb(engine.core.stop(sequence_id))
    engine.absorb(engine.core.lease_ended(leaving.ticket_id, sequence_id))
    engine.run()
    assert engine.answers[sequence_id].finish_reason is FinishReason.LENGTH
    engine.assert_idle()


def test_the_end_of_another_ticket_changes_nothing() -> None:
    engine, sequence_id, first = leaving_engine()
    engine.advance()
    engine.advance()
    second = departed(engine, sequence_id, 4)
    assert second is not None
    engine.absorb(engine.core.lease_ended(first.ticket_id, sequence_id))
    assert stop(engine, sequence_id) is not None


def test_a_sequence_that_outgrows_its_ticket_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.engine.leave.GROWTH", 12)
    engine, sequence_id, leaving = leaving_engine()
    assert leaving.growth == 12
    engine.run()
    assert [e for e in engine.events(sequence_id) if isinstance(e, Outgrown)]
    offers = [event for event in engine.events(sequence_id) if isinstance(event, Computed)]
    assert all(offer.num_tokens <= leaving.num_tokens + leaving.growth for offer in offers)
    assert engine.answers[sequence_id].finish_reason is FinishReason.LENGTH


def test_a_ticket_leaves_room_for_no_more_than_the_answer_may_become() -> None:
    _, _, leaving = leaving_engine(num_tokens=2, max_tokens=20)
    assert leaving.growth == 18
    assert leaving.growth < GROWTH


def test_who_has_not_begun_or_is_about_to_end_does_not_leave() -> None:
    engine = make_engine()
    sequence_id = engine.add(make_request("a", range(1, 7), max_tokens=6, ignore_eos=True))
    assert engine.core.depart(sequence_id) is None
    assert departed(engine, sequence_id, 3) is None
    handoff = engine.add(make_request("b", range(1, 7)), handoff=True)
    engine.submit()
    assert engine.core.depart(handoff) is None
    engine.run()
    assert engine.core.depart(sequence_id) is None


def test_a_leaving_sequence_keeps_its_blocks_when_others_need_some() -> None:
    engine = ToyEngine(EngineLimits(depth=2), num_blocks=12, block_size=BLOCK)
    older = engine.add(make_request("a", range(1, 13), max_tokens=20, ignore_eos=True))
    younger = engine.add(make_request("b", range(2, 14), max_tokens=20, ignore_eos=True))
    leaving = departed(engine, younger, 1)
    assert leaving is not None
    for _ in range(60):
        engine.advance()
    assert not any(name == "preempted" for name, _ in engine.answers[younger].stamps)
    assert stop(engine, younger) is not None
    engine.absorb(engine.core.lease_ended(leaving.ticket_id, younger))
    engine.run()
    assert engine.answers[older].finish_reason is FinishReason.LENGTH
