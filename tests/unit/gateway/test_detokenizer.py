"""Increments of text, joined, are the decoded tokens; characters stay whole and stop strings stay out."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.detokenizer import Detokenizer, OutputToken, TextDelta
from pdserve.gateway.tokenizer import Tokenizer
from tests import tiny_tokenizers as tiny

with tempfile.TemporaryDirectory() as scratch:
    _BYTE_LEVEL = tiny.byte_level(Path(scratch) / "byte_level")
    LEVEL, LEVEL_ORACLE = Tokenizer.load(_BYTE_LEVEL), FastTokenizer.from_file(str(_BYTE_LEVEL / "tokenizer.json"))
    _FALLBACK = tiny.byte_fallback(Path(scratch) / "byte_fallback")
    FALLBACK, FALLBACK_ORACLE = Tokenizer.load(_FALLBACK), FastTokenizer.from_file(str(_FALLBACK / "tokenizer.json"))

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ENDLESS = SamplingParams(max_tokens=1000)
ANY_LEVEL_IDS = st.lists(st.integers(0, tiny.BYTE_LEVEL_SIZE - 1), max_size=40)
ANY_FALLBACK_IDS = st.lists(st.integers(0, FALLBACK_ORACLE.get_vocab_size() - 1), max_size=40)


def run(
    tokenizer: Tokenizer,
    token_ids: list[int],
    *,
    reason: FinishReason = FinishReason.LENGTH,
    step: int = 1,
    sampling: SamplingParams = ENDLESS,
) -> list[TextDelta]:
    """All deltas of a request whose engine sends step tokens at a time."""
    detokenizer = Detokenizer(tokenizer.vocabulary, sampling)
    deltas: list[TextDelta] = []
    for start in range(0, max(len(token_ids), 1), step):
        chunk = tuple(token_ids[start : start + step])
        last = start + step >= len(token_ids)
        logprobs = tuple(-float(i) for i in range(start, start + len(chunk))) if sampling.logprobs else None
        deltas.append(
            detokenizer.push(
                TokenDelta(
                    request_id="r",
                    index=start,
                    token_ids=chunk,
                    logprobs=logprobs,
                    finish_reason=reason if last else None,
                )
            )
        )
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def joined(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@given(ANY_LEVEL_IDS, st.integers(1, 5))
def test_byte_level_increments_join_to_the_full_decode_of_any_tokens(token_ids: list[int], step: int) -> None:
    assert joined(run(LEVEL, token_ids, step=step)) == LEVEL_ORACLE.decode(token_ids, skip_special_tokens=True)


@given(TEXT, st.integers(1, 5))
def test_byte_level_text_comes_back_without_half_a_character(text: str, step: int) -> None:
    deltas = run(LEVEL, LEVEL_ORACLE.encode(text).ids, step=step)
    assert joined(deltas) == text
    assert "\ufffd" in text or not any("\ufffd" in delta.text for delta in deltas)


@given(TEXT, TEXT)
def test_byte_fallback_increments_continue_the_prompt(prompt: str, text: str) -> None:
    prompt_ids = FALLBACK_ORACLE.encode("a" + prompt).ids
    ids = FALLBACK_ORACLE.encode("a" + prompt + text).ids
    shared = next((i for i, pair in enumerate(zip(prompt_ids, ids, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(prompt_ids), len(ids)) if shared is None else shared
    before = FALLBACK_ORACLE.decode(ids[:start])
    assert before + joined(run(FALLBACK, ids[start:])) == FALLBACK_ORACLE.decode(ids) or "\ufffd" in before


@given(ANY_FALLBACK_IDS, st.integers(1, 5))
def test_byte_fallback_increments_of_any_tokens_join_to_their_bytes(token_ids: list[int], step: int) -> None:
    pieces = [FALLBACK_ORACLE.id_to_token(i) for i in token_ids if i > 2]
    raw = b"".join(
        bytes.fromhex(piece[3:5]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
        for piece in pieces
        if piece is not None
    )
    assert joined(run(FALLBACK, token_ids, step=step)) == raw.decode(errors="replace")


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the text is cut: the start of the stop string completed first, the longest of several."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@example("aaacab", ["aaab"], 1)
@example("aaabaabc", ["aaabc"], 1)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_text_ends_before_the_first_completed_stop_string(text: str, stops: list[str], step: int) -> None:
    deltas = run(LEVEL, LEVEL_ORACLE.encode(text).ids, step=step, sampling=replace(ENDLESS, stop=tuple(stops)))
    cut = first_stop(text, stops)
    assert joined(deltas) == (text if cut is None else text[:cut])
    assert deltas[-1].finish_reason is (FinishReason.LENGTH if cut is None else FinishReason.STOP)


@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_tokens_come_once_in_order_and_not_before_their_text(text: str, stops: list[str]) -> None:
    ids = LEVEL_ORACLE.encode(text).ids
    shown = ""
    released: list[OutputToken] = []
    reason = None
    for delta in run(LEVEL, ids, sampling=replace(ENDLESS, stop=tuple(stops), logprobs=True)):
        shown += delta.text
        released += delta.tokens
        reason = delta.finish_reason
        if delta.finish_reason is None:
            whole = b"".join(LEVEL.vocabulary.text_bytes(token.id) for token in released)
            assert len(whole.decode()) <= len(shown)
    assert [token.id for token in released] == ids[: len(released)]
    assert [token.logprob for token in released] == [-float(i) for i in range(len(released))]
    covered = b"".join(LEVEL.vocabulary.text_bytes(token.id) for token in released).decode(errors="ignore")
    assert covered.startswith(shown)
    if reason is FinishReason.STOP and released:
        before = b"".join(LEVEL.vocabulary.text_bytes(token.id) for token in released[:-1]).decode(errors="ignore")
        assert len(before) < len(shown), "tokens that the stop string hides altogether are left out"


def test_possible_stop_string_is_held_back_until_it_is_none() -> None:
    texts = [
        delta.text for delta in run(LEVEL, LEVEL_ORACLE.encode("xSTx").ids, sampling=replace(ENDLESS, stop=("STOP",)))
    ]
    assert texts == ["x", "", "", "STx"]


def test_stop_string_spanning_a_multibyte_character_is_found() -> None:
    deltas = run(LEVEL, LEVEL_ORACLE.encode("price: 5€!").ids, sampling=replace(ENDLESS, stop=("5€",)))
    assert joined(deltas) == "price: "
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_stop_string_completed_by_the_last_token_wins_over_length() -> None:
    deltas = run(LEVEL, LEVEL_ORACLE.encode("one.").ids, sampling=replace(ENDLESS, stop=(".",)))
    assert (joined(deltas), deltas[-1].finish_reason) == ("one", FinishReason.STOP)


def test_stop_strings_are_ignored_within_min_tokens() -> None:
    ids = LEVEL_ORACLE.encode("ababab").ids
    assert joined(run(LEVEL, ids, sampling=replace(ENDLESS, stop=("b",), min_tokens=2))) == "aba"


@pytest.mark.parametrize(("reason", "text"), [(FinishReason.STOP, "a"), (FinishReason.LENGTH, "ab")])
def test_only_the_token_that_ended_the_sequence_has_no_text(reason: FinishReason, text: str) -> None:
    a, b = LEVEL_ORACLE.encode("ab").ids
    assert joined(run(LEVEL, [a, b], reason=reason, sampling=replace(ENDLESS, stop_token_ids=(b,)))) == text


def test_character_cut_by_the_token_limit_becomes_one_replacement_character() -> None:
    ids = LEVEL_ORACLE.encode("a🙂").ids
    assert joined(run(LEVEL, ids[:-1])) == "a\ufffd"


def test_ids_the_tokenizer_does_not_know_have_no_text() -> None:
    assert joined(run(LEVEL, [LEVEL_ORACLE.encode("a").ids[0], tiny.BYTE_LEVEL_SIZE + 3])) == "a"


def test_end_of_sequence_counts_as_a_token_without_text() -> None:
    detokenizer = Detokenizer(LEVEL.vocabulary, SamplingParams(), (tiny.IM_END,))
    delta = detokenizer.push(
        TokenDelta(request_id="r", index=0, token_ids=(tiny.IM_END,), finish_reason=FinishReason.STOP)
    )
    assert (delta.text, detokenizer.num_tokens) == ("", 1)
