"""A small chat workload by seed, in the shape of Mooncake's conversations: shared system prompts, growing prefixes.

A turn's prompt is everything said before and a new question, so it shares all blocks of the turn before. Lengths fit
the demo model on a CPU. Hash ids name 16 tokens each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

from pdserve_loadgen.traces import BAILIAN_BLOCK, TraceEntry

SYSTEM_PROMPTS = 3
SYSTEM_BLOCKS = 6
TURNS = (3, 7)
QUESTION_BLOCKS = (3, 12)
ANSWER_TOKENS = (12, 40)
THINKING = (4.0, 20.0)
"""Seconds from a turn to the next."""


def conversations(requests: int, rate: float, seed: int) -> list[TraceEntry]:
    """So many requests, about rate per second from the first to the last."""
    rng = Random(f"{seed} conversations")
    settled = TURNS[1] * THINKING[1]
    turns = sorted(_turns(rng, settled + 2 * requests / rate, rate), key=lambda entry: entry.at)
    # Before that time conversations begin and none ends: fewer requests than later.
    wanted = [entry for entry in turns if entry.at >= settled][:requests]
    return shifted(wanted, -wanted[0].at)


def _turns(rng: Random, until: float, rate: float) -> Iterator[TraceEntry]:
    fresh = iter(range(SYSTEM_PROMPTS * SYSTEM_BLOCKS, 2**30))
    begins = 0.0
    while begins < until:
        begins += rng.expovariate(2 * rate / sum(TURNS))
        first = rng.randrange(SYSTEM_PROMPTS) * SYSTEM_BLOCKS
        blocks, at = list(range(first, first + SYSTEM_BLOCKS)), begins
        for _ in range(rng.randint(*TURNS)):
            blocks += [next(fresh) for _ in range(rng.randint(*QUESTION_BLOCKS))]
            yield TraceEntry(
                at=at,
                input_tokens=len(blocks) * BAILIAN_BLOCK + rng.randrange(BAILIAN_BLOCK),
                output_tokens=rng.randint(*ANSWER_TOKENS),
                hash_ids=tuple(blocks),
                block_tokens=BAILIAN_BLOCK,
            )
            at += rng.uniform(*THINKING)


def strangers(requests: int, rate: float, seed: int) -> list[TraceEntry]:
    """Requests as long as those of conversations that share nothing."""
    rng = Random(f"{seed} strangers")
    at = 0.0
    entries = []
    for _ in range(requests):
        at += rng.expovariate(rate)
        questions = rng.randint(1, rng.randint(*TURNS))
        blocks = SYSTEM_BLOCKS + sum(rng.randint(*QUESTION_BLOCKS) for _ in range(questions))
        tokens = blocks * BAILIAN_BLOCK + rng.randrange(BAILIAN_BLOCK)
        entries.append(TraceEntry(at=at, input_tokens=tokens, output_tokens=rng.randint(*ANSWER_TOKENS)))
    return entries


def warm_up(requests: int, gap: float, seed: int) -> list[TraceEntry]:
    """Strangers one after the other, gap seconds apart."""
    return [replace(entry, at=gap * place) for place, entry in enumerate(strangers(requests, 1.0, seed))]


def shifted(entries: Iterable[TraceEntry], seconds: float) -> list[TraceEntry]:
    return [replace(entry, at=entry.at + seconds) for entry in entries]
