from pdserve.core.request import FinishReason, SamplingParams
from pdserve.engine.stopping import StopRule, stop_rule

EOS = (2, 3)


def rule(sampling: SamplingParams, prompt_len: int = 10, max_len: int = 100) -> StopRule:
    return stop_rule(sampling, prompt_len=prompt_len, eos_token_ids=EOS, max_len=max_len)


def test_eos_and_stop_ids_stop() -> None:
    stops = rule(SamplingParams(max_tokens=9, stop_token_ids=(7,)))
    assert [stops.reason(token, 1) for token in (2, 3, 7, 8)] == [FinishReason.STOP] * 3 + [None]


def test_ignore_eos_spares_eos_but_not_stop_ids() -> None:
    stops = rule(SamplingParams(max_tokens=9, stop_token_ids=(7,), ignore_eos=True))
    assert stops.reason(2, 1) is None
    assert stops.reason(7, 1) is FinishReason.STOP


def test_a_stop_id_that_is_eos_stops_even_when_eos_is_ignored() -> None:
    assert rule(SamplingParams(max_tokens=9, stop_token_ids=(2,), ignore_eos=True)).reason(2, 1) is FinishReason.STOP


def test_nothing_stops_before_min_tokens_exist() -> None:
    stops = rule(SamplingParams(max_tokens=9, min_tokens=3))
    assert [stops.reason(2, count) for count in (1, 3, 4)] == [None, None, FinishReason.STOP]


def test_length_ends_at_max_tokens() -> None:
    stops = rule(SamplingParams(max_tokens=3))
    assert [stops.reason(9, count) for count in (2, 3)] == [None, FinishReason.LENGTH]


def test_length_ends_where_the_context_is_full() -> None:
    stops = rule(SamplingParams(max_tokens=50), prompt_len=97)
    assert [stops.reason(9, count) for count in (2, 3)] == [None, FinishReason.LENGTH]


def test_a_stop_token_at_the_limit_counts_as_stop() -> None:
    assert rule(SamplingParams(max_tokens=3)).reason(2, 3) is FinishReason.STOP


def test_min_tokens_does_not_lift_the_limit() -> None:
    assert rule(SamplingParams(max_tokens=3, min_tokens=3)).reason(2, 3) is FinishReason.LENGTH
