"""Rows to sample and settings to sample them with, for tests that compare samplers."""

from dataclasses import replace
from random import Random

from pdserve.core.batch import Row, SamplerInit
from tests.stepping import GREEDY


def row(sequence_id: int, init: SamplerInit | None, position: int = 10) -> Row:
    return Row(
        sequence_id=sequence_id,
        start=position - 1,
        num_tokens=1,
        token_ids=(0,),
        block_ids=(0,),
        sample=True,
        sampler=init,
    )


def random_init(rng: Random, vocab: int) -> SamplerInit:
    return replace(
        GREEDY,
        temperature=rng.choice([0.0, 0.5, 1.0, 3.0]),
        top_k=rng.choice([0, 0, 3, 40]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.4]),
        min_p=rng.choice([0.0, 0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.4, 0.8]),
        seed=rng.getrandbits(63),
        sample_index=rng.randrange(3),
        logprobs=rng.random() < 0.5,
        min_tokens=rng.choice([0, 3]),
        banned_token_ids=tuple(rng.sample(range(vocab), 3)),
        prompt_len=9,
        seen_token_ids=tuple(rng.choices(range(vocab), k=30)),
    )
