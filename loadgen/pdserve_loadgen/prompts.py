"""Synthetic prompts of wanted lengths: words drawn by seed, so that equal prefix ids give equal text.

A prompt's length in tokens is taken to be overhead + tokens_per_word × words. Both come from two probes the
server counted (`fit`); words that are one token each (`words_of`) make it exact.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.workload import PlannedRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TYPICAL_TOKENS_PER_WORD = 1.3
CACHED_BLOCKS = 4096
_ENOUGH_WORDS = 64
_WORD = re.compile(r"[a-z]{2,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How many tokens a prompt of so many words is; overhead is what a chat template adds."""

    tokens_per_word: float = TYPICAL_TOKENS_PER_WORD
    overhead: float = 0.0

    def words(self, tokens: float) -> int:
        return round(tokens / self.tokens_per_word)


def fit(short: tuple[int, int], long: tuple[int, int]) -> Sizing:
    """The sizing through two (words, tokens) the server counted; long must have more words."""
    slope = (long[1] - short[1]) / (long[0] - short[0])
    if slope <= 0:
        return Sizing()
    return Sizing(tokens_per_word=slope, overhead=max(0.0, short[1] - slope * short[0]))


def common_words() -> tuple[str, ...]:
    """Short English words, one to two tokens each for most tokenizers."""
    return tuple(files("pdserve_loadgen").joinpath("words.txt").read_text(encoding="utf-8").split())


def words_of(tokenizer_json: Path) -> tuple[str, ...]:
    """Lower-case words that are one token each, sorted. Raises UsageError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"--tokenizer: cannot read {tokenizer_json} ({error}); give a tokenizer.json") from None
    texts = {tokenizer.decode([token_id]).strip() for token_id in tokenizer.get_vocab().values()}
    words = [text for text in sorted(texts) if _WORD.fullmatch(text) and _is_one_token(tokenizer, text)]
    if len(words) < _ENOUGH_WORDS:
        raise UsageError(f"--tokenizer: {tokenizer_json} has too few one-token words; leave the option out")
    return tuple(words)


def _is_one_token(tokenizer: "Tokenizer", word: str) -> bool:
    """Both at the beginning of a prompt and after a space."""
    return len(tokenizer.encode(f"{word} {word} {word}", add_special_tokens=False).ids) == 3


class PromptWriter:
    """Writes the text of planned requests. Pure: the same arguments give the same text, in any order."""

    def __init__(self, words: Sequence[str], sizing: Sizing, seed: int) -> None:
        self._words = words
        self._sizing = sizing
        self._seed = seed
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._draw)

    def write(self, planned: PlannedRequest, turn: int = 0) -> str:
        """Text of one turn. Shared prefixes belong to the first turn; later ones are new text."""
        total = max(1, self._sizing.words(planned.input_tokens - self._sizing.overhead))
        words: list[str] = []
        for number, prefix_id in enumerate(planned.prefix_ids if turn == 0 else (), start=1):
            # Ends are rounded, not block lengths: over thousands of blocks errors would add up.
            end = self._sizing.words(number * planned.block_tokens)
            words += self._block(f"prefix {prefix_id}", end - len(words))
        if len(words) < total:
            words += self._draw(f"rest {planned.index} {turn}", total - len(words))
        return " ".join(words[:total])

    def probe(self, words: int) -> str:
        """Text to be counted by the server."""
        return " ".join(self._draw("probe", words))

    def _draw(self, name: str, count: int) -> list[str]:
        return Random(f"{self._seed} {name}").choices(self._words, k=count)
