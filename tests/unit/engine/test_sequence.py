from typing import Any

import pytest

from pdserve.core.batch import TokenSource
from pdserve.core.errors import InvalidRequest
from pdserve.engine.sequence import Sequence, SequenceState, sampler_init
from pdserve.engine.stopping import stop_rule
from tests.unit.engine.toy import EOS, make_request


def make_sequence(*, prompt_len: int = 6, handoff: bool = False, **sampling: Any) -> Sequence:
    request = make_request("r", range(1, prompt_len + 1), **sampling)
    rule = stop_rule(request.sampling, prompt_len=prompt_len, eos_token_ids=(EOS,), max_len=100)
    return Sequence(sequence_id=1, request=request, rule=rule, namespace=b"n" * 32, deadline=1.0, handoff=handoff)


def test_the_last_chunk_samples_and_the_next_row_takes_its_token_from_the_step_before() -> None:
    sequence = make_sequence()
    sequence.admit(0)
    chunk = sequence.schedule(4, (0,))
    assert (chunk.start, chunk.token_ids, chunk.sample, chunk.sampler) == (0, (1, 2, 3, 4), False, None)
    tail = sequence.schedule(2, (0, 1))
    assert (tail.start, tail.token_ids, tail.sample) == (4, (5, 6), True)
    assert tail.sampler is not None
    ahead = sequence.schedule(1, (0, 1))
    assert ahead.token_source is TokenSource.PREVIOUS_STEP
    assert (ahead.start, ahead.num_tokens, ahead.token_ids, ahead.sample) == (6, 1, (), True)
    assert ahead.sampler is None, "sampler state is sent once"


def test_a_token_the_host_has_seen_is_sent_by_value() -> None:
    sequence = make_sequence()
    sequence.admit(4)
    sequence.schedule(2, (0, 1))
    sequence.receive(33)
    row = sequence.schedule(1, (0, 1))
    assert (row.token_source, row.token_ids, row.start) == (TokenSource.KNOWN, (33,), 6)


def test_no_row_is_scheduled_past_the_last_allowed_token() -> None:
    sequence = make_sequence(max_tokens=2)
    sequence.admit(0)
    sequence.schedule(6, (0, 1))
    assert sequence.num_pending_tokens == 1
    sequence.schedule(1, (0, 1))
    assert sequence.num_pending_tokens == 0


def test_a_handoff_wants_nothing_after_its_first_token() -> None:
    sequence = make_sequence(handoff=True)
    sequence.admit(0)
    sequence.schedule(6, (0, 1))
    assert sequence.num_pending_tokens == 0


def test_sampler_state_carries_history_and_bans() -> None:
    sequence = make_sequence(min_tokens=2, stop_token_ids=(9, 5), max_tokens=4, seed=77)
    sequence.start_fetch(0)
    sequence.fetched((30,))
    init = sequence.schedule(1, (0, 1)).sampler
    assert init is not None
    assert init.seen_token_ids == (1, 2, 3, 4, 5, 6, 30)
    assert init.prompt_len == 6
    assert init.banned_token_ids == (EOS, 5, 9)
    assert (init.seed, init.min_tokens) == (77, 2)


def test_ignored_eos_is_not_banned_and_without_min_tokens_nothing_is() -> None:
    cases: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"min_tokens": 1, "ignore_eos": True, "stop_token_ids": (5,)}, (5,)),
        ({}, ()),
    ]
    for sampling, banned in cases:
        sequence = make_sequence(**sampling)
        sequence.admit(0)
        init = sequence.schedule(6, (0, 1)).sampler
        assert init is not None
        assert init.banned_token_ids == banned


def test_preemption_forgets_kv_but_no_token_and_sends_sampler_state_anew() -> None:
    sequence = make_sequence()
    sequence.admit(4)
    sequence.schedule(2, (0, 1))
    sequence.receive(33)
    assert sequence.preempt()
    assert sequence.state is SequenceState.WAITING
    assert (sequence.num_computed_tokens, sequence.num_pending_tokens) == (0, 7)
    sequence.admit(0)
    row = sequence.schedule(7, (2, 3))
    assert row.token_ids == (1, 2, 3, 4, 5, 6, 33)
    assert row.sampler is not None
    assert row.sampler.seen_token_ids == row.token_ids
    assert (sequence.admission, sequence.num_cached_tokens) == (2, 4)


def test_transitions_outside_the_figure_are_refused() -> None:
    sequence = make_sequence()
    with pytest.raises(ValueError, match="is waiting and cannot become running"):
        sequence.fetched((1,))
    with pytest.raises(ValueError, match="cannot become waiting"):
        sequence.preempt()
    sequence.start_fetch(0)
    with pytest.raises(ValueError, match="is fetching"):
        sequence.admit(0)
    sequence.finish()
    with pytest.raises(ValueError, match="is finished"):
        sequence.finish()


@pytest.mark.parametrize(("temperature", "kept"), [(0.0, 0.0), (5e-324, 0.0), (1e-40, 0.0), (1e-6, 1e-6), (0.7, 0.7)])
def test_a_temperature_too_low_to_divide_by_is_none(temperature: float, kept: float) -> None:
    assert sampler_init(make_sequence(seed=1, temperature=temperature)).temperature == kept


@pytest.mark.parametrize("penalty", [1e-39, 0.0, 1e39, float("nan")])
def test_a_penalty_that_scores_cannot_bear_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidRequest, match="repetition_penalty must be between"):
        make_sequence(repetition_penalty=penalty)
