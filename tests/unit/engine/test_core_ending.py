"""Requests that are refused, cancelled, fail or run out of time."""

import pytest

from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import EngineDied, InvalidRequest, LayoutMismatch, NotANumber, PdserveError, Unsupported
from pdserve.core.request import FinishReason
from tests.unit.engine.tickets import make_ticket
from tests.unit.engine.toy import VOCAB, FakeClock, ToyEngine, make_core, make_request


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    core = make_core(EngineLimits(max_model_len=20))
    core.add(make_request("a", [1] * 19))
    with pytest.raises(InvalidRequest, match="20 tokens; at most 19"):
        core.add(make_request("b", [1] * 20))
    with pytest.raises(InvalidRequest, match="at most 7"):
        make_core(num_blocks=2, block_size=4).add(make_request("c", [1] * 8))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_token_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"between 0 and {VOCAB - 1}"):
        make_core().add(make_request("a", [1, token]))


def test_a_request_without_seed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        make_core().add(make_request("a", [1], seed=None))


def test_tickets_that_cannot_be_used_are_refused() -> None:
    request = make_request("a", [1] * 6)
    good = make_ticket(request, block_size=4)
    with pytest.raises(Unsupported, match="does not take over"):
        make_core(EngineLimits(accepts_handoff=False)).add(request, ticket=good)
    with pytest.raises(InvalidRequest, match="not both"):
        make_core().add(request, handoff=True, ticket=good)
    with pytest.raises(InvalidRequest, match="covers 6 tokens, the prompt has 7"):
        make_core().add(make_request("b", [1] * 7), ticket=good)
    with pytest.raises(LayoutMismatch, match="hold 16 tokens, blocks here 4"):
        make_core().add(request, ticket=make_ticket(request, block_size=16))


@pytest.mark.parametrize("moves", range(6))
def test_cancelling_at_any_moment_frees_everything(moves: int) -> None:
    engine = ToyEngine(EngineLimits(chunk_size=4))
    sequence_id = engine.add(make_request("a", list(range(1, 10)), max_tokens=50, ignore_eos=True))
    for _ in range(moves):
        engine.advance()
    engine.absorb(engine.core.abort(sequence_id))
    assert engine.answers[sequence_id].finish_reason is FinishReason.CANCELLED
    assert engine.answers[sequence_id].finished
    assert engine.core.abort(sequence_id) == []
    engine.run()
    engine.assert_idle()


def test_an_error_reaches_the_client_with_its_code() -> None:
    engine = ToyEngine()
    sequence_id = engine.add(make_request("a", [1, 2]))
    error: PdserveError = EngineDied("the worker is gone")
    engine.absorb(engine.core.abort(sequence_id, error))
    assert engine.answers[sequence_id].finish_reason is FinishReason.ERROR
    assert engine.answers[sequence_id].error == ("engine_died", "the worker is gone")


def test_deadlines_end_waiting_and_running_requests_but_no_others() -> None:
    clock = FakeClock()
    engine = ToyEngine(EngineLimits(max_rows=1), clock=clock)
    running = engine.add(make_request("a", [1, 2], timeout=5.0, max_tokens=50, ignore_eos=True))
    waiting = engine.add(make_request("b", [3, 4], timeout=3.0))
    patient = engine.add(make_request("c", [5, 6], timeout=50.0))
    engine.submit()
    assert engine.core.next_deadline == clock.now + 3.0
    engine.absorb(engine.core.expire(clock.now + 2.9))
    assert not engine.answers[waiting].finished
    engine.absorb(engine.core.expire(clock.now + 5.0))
    for sequence_id in (running, waiting):
        error = engine.answers[sequence_id].error
        assert error is not None
        assert error[0] == "deadline_exceeded"
    engine.run()
    assert engine.answers[patient].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert engine.core.next_deadline is None
    engine.assert_idle()


def test_a_sequence_preempted_with_its_last_token_in_flight_ends_while_it_waits() -> None:
    engine = ToyEngine(EngineLimits(depth=2), num_blocks=6, block_size=4)
    old = engine.add(make_request("a", [1] * 11, max_tokens=6, ignore_eos=True))
    young = engine.add(make_request("b", [2] * 11, max_tokens=2, ignore_eos=True))
    engine.run()
    assert len(engine.answers[old].token_ids) == 6
    assert len(engine.answers[young].token_ids) == 2
    engine.assert_idle()


def test_a_prompt_whose_scores_are_no_numbers_fails_and_is_no_hit_for_others() -> None:
    engine = ToyEngine(EngineLimits(chunk_size=4, depth=2))
    broken, sound = (
        engine.add(make_request(name, [*range(first, first + 9)])) for name, first in (("a", 1), ("b", 20))
    )
    engine.device.breaks = broken
    engine.run()
    answer = engine.answers[broken]
    assert answer.finish_reason is FinishReason.ERROR
    assert answer.error is not None
    assert answer.error[0] == NotANumber.code
    assert answer.token_ids == []
    assert engine.answers[sound].finish_reason is not FinishReason.ERROR
    engine.assert_idle()
    engine.device.breaks = None
    again = engine.add(make_request("c", [*range(1, 10)]))
    engine.run()
    assert engine.answers[again].cached_tokens == 0
