"""Prompts have the lengths and the shared beginnings their plan says."""

import json
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.prompts import PromptWriter, Sizing, common_words, fit, words_of
from pdserve_loadgen.workload import PlannedRequest

WORDS = common_words()
BLOCK = 64


def planned(index: int = 0, tokens: int = 200, ids: tuple[int, ...] = ()) -> PlannedRequest:
    return PlannedRequest(index=index, at=0.0, input_tokens=tokens, output_tokens=1, prefix_ids=ids, block_tokens=BLOCK)


def shared_words(one: str, other: str) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one.split(), other.split(), strict=False))))


SIZINGS = st.builds(Sizing, tokens_per_word=st.floats(0.5, 3), overhead=st.floats(0, 20))


@given(st.integers(1, 4000), SIZINGS)
def test_a_prompt_has_the_words_its_tokens_need(tokens: int, sizing: Sizing) -> None:
    words = len(PromptWriter(WORDS, sizing, 0).write(planned(tokens=tokens)).split())
    wanted = max(1.0, (tokens - sizing.overhead) / sizing.tokens_per_word)
    assert words == pytest.approx(wanted, abs=0.51)


@given(
    st.lists(st.integers(0, 5), max_size=8),
    st.lists(st.integers(0, 5), max_size=8),
    st.integers(1, 700),
    st.integers(1, 700),
    SIZINGS,
)
def test_equal_prefix_ids_mean_equal_beginnings(
    ids: list[int], others: list[int], tokens: int, other_tokens: int, sizing: Sizing
) -> None:
    writer = PromptWriter(WORDS, sizing, 3)
    one, other = writer.write(planned(1, tokens, tuple(ids))), writer.write(planned(2, other_tokens, tuple(others)))
    equal = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))))
    least = min(sizing.words(equal * BLOCK), len(one.split()), len(other.split()))
    assert shared_words(one, other) >= least


def test_unequal_prefix_ids_mean_unequal_beginnings() -> None:
    writer = PromptWriter(WORDS, Sizing(tokens_per_word=1.0), 0)
    one, other = writer.write(planned(0, 256, (1, 2, 3, 4))), writer.write(planned(1, 256, (1, 2, 9, 4)))
    assert 2 * BLOCK <= shared_words(one, other) < 2 * BLOCK + 5


def test_prompts_without_prefix_share_nothing_but_repeat_with_their_seed() -> None:
    texts = [PromptWriter(WORDS, Sizing(), 0).write(planned(index)) for index in range(20)]
    assert max(shared_words(a, b) for a in texts for b in texts if a is not b) < 5
    assert texts[3] == PromptWriter(WORDS, Sizing(), 0).write(planned(3))
    assert texts[3] != PromptWriter(WORDS, Sizing(), 1).write(planned(3))


def test_each_turn_says_something_new() -> None:
    writer = PromptWriter(WORDS, Sizing(tokens_per_word=1.0), 0)
    turns = [writer.write(planned(0, 100, (1,)), turn) for turn in range(3)]
    assert len(set(turns)) == 3
    assert [len(text.split()) for text in turns] == [100, 100, 100]


def test_two_counted_prompts_tell_overhead_and_tokens_per_word() -> None:
    sizing = fit((16, 39), (272, 551))
    assert (sizing.tokens_per_word, sizing.overhead) == (2.0, 7.0)


def test_a_server_that_counts_nonsense_leaves_the_estimate() -> None:
    assert fit((16, 5), (272, 5)) == Sizing()


def word_tokenizer(path: Path, words: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_words_are_single_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    known = [word for word in WORDS if "e" in word]
    path = word_tokenizer(tmp_path / "tokenizer.json", [*known, "Not", "1234", "x"])
    assert words_of(path) == tuple(sorted(known))


def test_the_demo_models_tokenizer_makes_exact_prompts() -> None:
    path = Path(__file__).parents[3] / "pdserve/assets/demo/tokenizer.json"
    writer = PromptWriter(words_of(path), Sizing(tokens_per_word=1.0), 0)
    tokenizer = Tokenizer.from_file(str(path))
    for tokens in (1, 37, 900):
        text = writer.write(planned(tokens=tokens, ids=(4, 5)))
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == tokens


@pytest.mark.parametrize("content", ["{}", "nothing", json.dumps({"version": "1.0"})])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="--tokenizer: cannot read"):
        words_of(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        words_of(word_tokenizer(tmp_path / "tokenizer.json", ["ab", "cd"]))
