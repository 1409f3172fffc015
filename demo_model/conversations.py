"""Words the pairs as conversations: other wordings each pass, some with a system prompt, some with several turns."""

import random
from collections.abc import Iterable
from typing import Final

from demo_model import basics, chat_pairs, scripted, wordings
from demo_model.chat_pairs import Pair
from demo_model.corpus import Document
from demo_model.recipe import Turn

_SCRIPTED_WEIGHT: Final = 4
_BASICS_WEIGHT: Final = 2
_SYSTEM_SHARE: Final = 0.12
_FOLLOW_UP_SHARE: Final = 0.18


def _scripted() -> list[Pair]:
    return [
        Pair("scripted", question, answer, _SCRIPTED_WEIGHT)
        for questions, answer in scripted.CONVERSATIONS
        for question in questions
    ]


def _basics() -> list[Pair]:
    return [
        Pair("scripted", wording.format(task=task), basics.answer(lead, code), _BASICS_WEIGHT)
        for task, lead, code in basics.HOW_TO
        for wording in basics.WORDINGS
    ]


def _exchange(pair: Pair, rng: random.Random) -> list[Turn]:
    return [Turn("user", wordings.ask(pair.kind, pair.name, rng)), Turn("assistant", pair.answer)]


def conversations(documents: Iterable[Document], held_out: bool, seed: int, core: bool = False) -> list[list[Turn]]:
    """Return one pass over the pairs of a split, shuffled and worded by the seed.

    The hand-written pairs belong to the training split only, and held-out pairs are asked once and alone,
    so that the held-out figure speaks of documentation that the model has not seen. `core` keeps only those
    training pairs that are shown more than once: built-ins, glossary, FAQ, modules and the hand-written ones.
    """
    rng = random.Random(seed)
    pairs = [pair for document in documents if document.held_out == held_out for pair in chat_pairs.cut(document)]
    if held_out:
        return [_exchange(pair, rng) for pair in pairs]
    pairs += _scripted() + _basics()
    weighted = [pair for pair in pairs for _ in range(pair.weight) if pair.weight > 1 or not core]
    rng.shuffle(weighted)
    talks: list[list[Turn]] = []
    for pair in weighted:
        turns = _exchange(pair, rng)
        if talks and len(talks[-1]) < 6 and rng.random() < _FOLLOW_UP_SHARE:
            talks[-1].extend(turns)
            continue
        if rng.random() < _SYSTEM_SHARE:
            turns.insert(0, Turn("system", rng.choice(wordings.SYSTEM_PROMPTS)))
        talks.append(turns)
    return talks
