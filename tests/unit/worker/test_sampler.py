"""Choosing tokens: greedy and random, per-sequence state, logprobs, and independence of the batch."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdserve.core.batch import Row, RowOutput, SamplerInit
from pdserve.worker.sampler import Sampler
from tests.stepping import GREEDY

VOCAB = 301
RANDOM = replace(GREEDY, temperature=0.8, seed=7)


def row(sequence_id: int, sampler: SamplerInit | None, position: int = 10) -> Row:
    return Row(
        sequence_id=sequence_id,
        start=position - 1,
        num_tokens=1,
        token_ids=(0,),
        block_ids=(0,),
        sample=True,
        sampler=sampler,
    )


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(
    scores: Tensor, *rows: Row, sampler: Sampler | None = None, masks: Sequence[bytes | None] | None = None
) -> list[RowOutput]:
    return (sampler or Sampler(scores.shape[1], torch.device("cpu"))).sample(scores, rows, masks)


def token(scores: Tensor, one: Row, sampler: Sampler | None = None) -> int:
    (output,) = sample(scores, one, sampler=sampler)
    return output.token_ids[0]


def test_temperature_zero_takes_the_best_and_of_equals_the_first() -> None:
    scores = logits()
    assert token(scores, row(1, GREEDY)) == scores.argmax()
    scores[0, [200, 30, 100]] = 50.0
    assert token(scores, row(1, GREEDY)) == 30


@pytest.mark.parametrize("init", [GREEDY, RANDOM])
def test_a_row_that_is_not_a_number_has_no_token_and_disturbs_no_other(init: SamplerInit) -> None:
    scores = logits(4)
    clean = [output.token_ids for output in sample(scores, *(row(i, init) for i in range(4)))]
    scores[1, 7], scores[2, 9] = float("nan"), float("inf")
    found = [output.token_ids for output in sample(scores, *(row(i, init) for i in range(4)))]
    assert found == [clean[0], (), (), clean[3]]


def test_a_mask_that_allows_nothing_has_no_token() -> None:
    (output,) = sample(logits(), row(1, GREEDY), masks=[bytes((VOCAB + 7) // 8)])
    assert output.token_ids == ()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda temperature, top_k, top_p, min_p, penalty, seed: replace(
                GREEDY,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=penalty,
                seed=seed,
                logprobs=True,
                seen_token_ids=(1, 2, 3),
            ),
            st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            st.sampled_from([0, 3, 40]),
            st.sampled_from([0.4, 0.95, 1.0]),
            st.sampled_from([0.0, 0.1]),
            st.sampled_from([1.0, 1.4]),
            st.integers(0, 2**63 - 1),
        ),
        min_size=2,
        max_size=9,
    ),
    st.integers(0, 1000),
)
def test_a_rows_token_and_logprob_do_not_depend_on_the_batch(inits: list[SamplerInit], seed: int) -> None:
    scores = logits(len(inits), seed)
    together = sample(scores, *(row(i, init) for i, init in enumerate(inits)))
    for i, init in enumerate(inits):
        assert sample(scores[i : i + 1], row(i, init)) == [together[i]]


def test_a_token_follows_from_seed_index_and_position_and_each_of_them_counts() -> None:
    scores = torch.zeros(1, 4096)
    drawn = token(scores, row(1, RANDOM))
    assert token(scores, row(2, RANDOM)) == drawn
    assert token(scores, row(1, replace(RANDOM, seed=8))) != drawn
    assert token(scores, row(1, replace(RANDOM, sample_index=1))) != drawn
    assert token(scores, row(1, RANDOM, position=11)) != drawn


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (replace(RANDOM, temperature=1.0), [0.5, 0.25, 0.125, 0.125]),
        (replace(RANDOM, temperature=0.5), [0.7272727, 0.1818182, 0.0454545, 0.0454545]),
        (replace(RANDOM, temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (replace(RANDOM, temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (replace(RANDOM, temperature=1.0, min_p=0.4), [2 / 3, 1 / 3, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_many_draws_follow_the_distribution(init: SamplerInit, expected: list[float]) -> None:
    """20,000 positions; a frequency strays by more than 0.015 with probability below 1e-4."""
    draws = 20_000
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(draws, -1)
    outputs = sample(scores, *(row(position, init, position) for position in range(1, draws + 1)))
    counts = torch.bincount(torch.tensor([output.token_ids[0] for output in outputs]), minlength=4) / draws
    torch.testing.assert_close(counts, torch.tensor(expected), atol=0.015, rtol=0)
    assert all(count == 0 for count, share in zip(counts.tolist(), expected, strict=True) if share == 0)


def test_logprobs_are_of_the_untouched_logits() -> None:
    scores = logits()
    init = replace(RANDOM, temperature=0.1, top_k=2, repetition_penalty=3.0, seen_token_ids=(5,), logprobs=True)
    (output,) = sample(scores, row(1, init))
    assert output.logprobs == pytest.approx([scores[0].log_softmax(0)[output.token_ids[0]].item()], abs=1e-6)


def test_logprobs_come_only_to_those_who_ask() -> None:
    outputs = sample(logits(3), row(1, GREEDY), row(2, replace(GREEDY, logprobs=True)), row(3, RANDOM))
    assert [output.logprobs is not None for output in outputs] == [False, True, False]


class TestRepetitionPenalty:
    INIT = replace(GREEDY, repetition_penalty=2.0, seen_token_ids=(3,))
    SCORES = torch.tensor([[1.0, 1.4, 1.2, 2.0]])

    def test_it_covers_the_given_history(self) -> None:
        assert token(self.SCORES, row(1, self.INIT)) == 1

    def test_it_extends_with_every_sampled_token(self) -> None:
        sampler = Sampler(4, torch.device("cpu"))
        tokens = [token(self.SCORES, row(1, self.INIT if not i else None, 10 + i), sampler) for i in range(4)]
        assert tokens == [1, 2, 0, 3]

    def test_each_sequence_has_its_own_history(self) -> None:
        sampler = Sampler(4, torch.device("cpu"))
        other = replace(self.INIT, seen_token_ids=(0, 1, 2))
        both = sample(self.SCORES.expand(2, -1), row(1, self.INIT), row(2, other), sampler=sampler)
        assert [output.token_ids for output in both] == [(1,), (3,)]
        again = sample(self.SCORES.expand(2, -1), row(2, None, 11), row(1, None, 11), sampler=sampler)
        assert [output.token_ids for output in again] == [(3,), (2,)]

    def test_settings_sent_again_replace_the_history(self) -> None:
        sampler = Sampler(4, torch.device("cpu"))
        assert token(self.SCORES, row(1, self.INIT), sampler) == 1
        assert token(self.SCORES, row(1, replace(self.INIT, seen_token_ids=())), sampler) == 3

    def test_a_dropped_sequence_is_forgotten(self) -> None:
        sampler = Sampler(4, torch.device("cpu"))
        sample(self.SCORES, row(1, self.INIT), sampler=sampler)
        sampler.drop([1, 99])
        with pytest.raises(ValueError, match="sequence 1 is sampled without ever"):
            sample(self.SCORES, row(1, None), sampler=sampler)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_wait_for_min_tokens(temperature: float) -> None:
    scores = torch.full((1, VOCAB), -30.0)
    scores[0, 298], scores[0, 4] = 30.0, 0.0
    init = replace(
        GREEDY, temperature=temperature, prompt_len=10, min_tokens=2, banned_token_ids=(298, 299), seen_token_ids=()
    )
    assert [token(scores, row(1, init, position)) for position in (10, 11, 12)] == [4, 4, 298]


def test_a_mask_allows_only_its_tokens() -> None:
    scores = logits(2)
    scores[:, 9] = -20.0
    bits = bytearray(-(-VOCAB // 8))
    bits[9 // 8] |= 1 << 9 % 8
    outputs = sample(scores, row(1, GREEDY), row(2, GREEDY), masks=[bytes(bits), None])
    assert [output.token_ids[0] for output in outputs] == [9, scores[1].argmax()]


def test_logits_are_left_as_they_were() -> None:
    scores = logits()
    before = scores.clone()
    init = replace(RANDOM, repetition_penalty=2.0, seen_token_ids=(1,), min_tokens=5, banned_token_ids=(2,), top_k=3)
    sample(scores, row(1, init))
    assert torch.equal(scores, before)
