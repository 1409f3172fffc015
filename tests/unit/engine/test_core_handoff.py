"""The prefill side: tickets' blocks are leased from the first scheduling to the release."""

import pytest

from pdserve.core.endpoint import EngineLimits
from pdserve.core.request import FinishReason
from pdserve.engine.core_events import Computed, CoreEvent, Emitted, Finished, HandoffScheduled
from tests.unit.engine.toy import ToyEngine, make_request, oracle

PROMPT = list(range(1, 11))


def make_prefill(*, num_blocks: int = 64) -> ToyEngine:
    return ToyEngine(EngineLimits(chunk_size=4, max_tokens_per_step=8, depth=2), num_blocks=num_blocks, block_size=4)


def scheduled(engine: ToyEngine, sequence_id: int) -> HandoffScheduled:
    (event,) = [e for e in engine.events(sequence_id) if isinstance(e, HandoffScheduled)]
    return event


def test_a_handoff_leases_its_prompt_reports_progress_and_ends_after_one_token() -> None:
    engine = make_prefill()
    request = make_request("a", PROMPT, max_tokens=20, ignore_eos=True)
    sequence_id = engine.add(request, handoff=True)
    engine.run()
    first, *progress, emitted, finished = engine.events(sequence_id)
    assert isinstance(first, HandoffScheduled)
    assert (first.num_tokens, len(first.source_blocks), first.num_cached_tokens) == (10, 3, 0)
    assert [e.num_tokens for e in progress if isinstance(e, Computed)] == [4, 8, 10]
    assert isinstance(emitted, Emitted)
    assert emitted.token_ids == oracle(request)[0][:1]
    assert emitted.finish_reason is None, "the request goes on elsewhere"
    assert isinstance(finished, Finished)
    assert len(engine.batches) == 3
    assert engine.core.kv.counts().leased == 3
    assert engine.core.kv.release(first.ticket_id)
    assert not engine.core.kv.release(first.ticket_id)
    engine.assert_idle()


@pytest.mark.parametrize("max_tokens", [1, 9])
def test_a_request_that_ends_with_its_first_token_says_so(max_tokens: int) -> None:
    engine = make_prefill()
    request = make_request("a", PROMPT, max_tokens=max_tokens, ignore_eos=True)
    if max_tokens > 1:
        first_token = oracle(request)[0][0]
        request = make_request("a", PROMPT, max_tokens=max_tokens, stop_token_ids=(first_token,))
    sequence_id = engine.add(request, handoff=True)
    engine.run()
    reason = FinishReason.LENGTH if max_tokens == 1 else FinishReason.STOP
    assert engine.answers[sequence_id].finish_reason is reason


def test_kv_is_reported_only_once_its_step_was_collected() -> None:
    engine = make_prefill()
    sequence_id = engine.add(make_request("a", PROMPT), handoff=True)
    engine.submit()
    engine.submit()
    assert not [e for e in engine.events(sequence_id) if isinstance(e, Computed)]
    engine.collect()
    assert engine.events(sequence_id)[-1] == Computed(sequence_id=sequence_id, num_tokens=4)


def test_cached_blocks_are_offered_at_once() -> None:
    engine = make_prefill()
    engine.add(make_request("a", PROMPT))
    engine.run()
    sequence_id = engine.add(make_request("b", PROMPT), handoff=True)
    engine.submit()
    assert scheduled(engine, sequence_id).num_cached_tokens == 8


@pytest.mark.parametrize("moves", range(1, 5))
def test_cancelling_leaves_the_blocks_leased_until_the_release(moves: int) -> None:
    engine = make_prefill()
    sequence_id = engine.add(make_request("a", PROMPT), handoff=True)
    for _ in range(moves):
        engine.advance()
    engine.absorb(engine.core.abort(sequence_id))
    engine.run()
    assert engine.core.kv.counts().leased == 3
    engine.core.kv.release(scheduled(engine, sequence_id).ticket_id)
    engine.core.kv.check()
    engine.assert_idle()


def test_leases_hold_back_new_prompts_until_one_is_released() -> None:
    engine = make_prefill(num_blocks=5)
    first = engine.add(make_request("a", PROMPT), handoff=True)
    second = engine.add(make_request("b", PROMPT[::-1]), handoff=True)
    engine.run()
    assert engine.answers[first].finished
    assert engine.events(second) == []
    assert (engine.core.load().waiting, engine.core.load().fetching) == (1, 0)
    engine.core.kv.release(scheduled(engine, first).ticket_id)
    engine.run()
    assert engine.answers[second].finished


def test_at_the_watermark_prompts_for_others_wait_and_own_ones_pass() -> None:
    engine = make_prefill(num_blocks=15)
    first = engine.add(make_request("a", [1 + n % 38 for n in range(48)], max_tokens=1), handoff=True)
    engine.run()
    assert engine.core.kv.counts().leased == 12, "of 15"
    waiting = engine.add(make_request("b", PROMPT[:5]), handoff=True)
    own = engine.add(make_request("c", PROMPT[:5], max_tokens=2))
    engine.run()
    assert engine.answers[own].finish_reason is FinishReason.LENGTH
    assert not engine.events(waiting)
    engine.core.kv.release(scheduled(engine, first).ticket_id)
    engine.run()
    assert scheduled(engine, waiting)


def test_two_tickets_of_one_prefix_and_one_of_them_released() -> None:
    engine = make_prefill()
    first = engine.add(make_request("a", PROMPT), handoff=True)
    engine.run()
    second = engine.add(make_request("b", PROMPT), handoff=True)
    engine.run()
    one, two = scheduled(engine, first), scheduled(engine, second)
    assert one.source_blocks[:2] == two.source_blocks[:2]
    before = [engine.device.block(b) for b in two.source_blocks]
    engine.core.kv.release(one.ticket_id)
    for name in range(40):
        engine.add(make_request(f"n{name}", [3 + name % 30] * 9))
    engine.run()
    assert [engine.device.block(b) for b in two.source_blocks] == before
    engine.core.kv.release(two.ticket_id)
    engine.assert_idle()


def test_a_sequence_with_an_issued_ticket_is_never_preempted() -> None:
    engine = ToyEngine(EngineLimits(chunk_size=4, depth=1), num_blocks=5, block_size=4)
    old = engine.add(make_request("a", PROMPT[:8], max_tokens=8, ignore_eos=True))
    handoff = engine.add(make_request("b", [5] * 12), handoff=True)
    engine.run()
    assert engine.answers[handoff].finished
    assert "preempted" not in [name for name, _ in engine.answers[handoff].stamps]
    assert len(engine.answers[old].token_ids) == 1, "its next block is among the leased ones"
    engine.core.kv.release(scheduled(engine, handoff).ticket_id)
    engine.run()
    assert len(engine.answers[old].token_ids) == 8
    engine.assert_idle()


def test_events_not_taken_yet_come_before_later_ones() -> None:
    engine = make_prefill()
    sequence_id = engine.add(make_request("a", PROMPT), handoff=True)
    assert engine.core.schedule() is not None
    events: list[CoreEvent] = engine.core.abort(sequence_id)
    assert [type(event) for event in events] == [HandoffScheduled, Emitted, Finished]
