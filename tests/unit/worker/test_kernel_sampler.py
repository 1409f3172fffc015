"""The kernel's choices are the CPU sampler's, step after step, for any settings, masks and histories."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.core.batch import RowOutput, SamplerInit
from pdserve.worker.sampler import Sampler
from tests.sampling_rows import random_init, row
from tests.stepping import GREEDY

if not find_spec("triton"):
    pytest.skip("needs Triton, which CUDA builds of torch bring along", allow_module_level=True)

from pdserve.worker.kernel_sampler import KernelSampler

VOCAB = 301
CPU = torch.device("cpu")
Samplers = tuple[Sampler, KernelSampler]


def samplers(vocab: int = VOCAB) -> Samplers:
    return Sampler(vocab, CPU), KernelSampler(vocab, CPU)


def assert_same(got: Sequence[RowOutput], expected: Sequence[RowOutput]) -> None:
    assert [(o.sequence_id, o.token_ids) for o in got] == [(o.sequence_id, o.token_ids) for o in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.logprobs == (theirs.logprobs and pytest.approx(theirs.logprobs, abs=1e-5))


def compare(seed: int, *, rows: int, steps: int, vocab: int) -> None:
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    cpu, kernel = samplers(vocab)
    inits: list[SamplerInit | None] = [random_init(rng, vocab) for _ in range(rows)]
    for step in range(steps):
        logits: Tensor = torch.randn(rows, vocab, generator=generator) * 3
        batch = [row(i, init, 10 + step) for i, init in enumerate(inits)]
        masks = [rng.randbytes(-(-vocab // 8)) if rng.random() < 0.3 else None for _ in batch]
        expected = cpu.sample(logits.clone(), batch, masks)
        assert_same(kernel.sample(logits, batch, masks), expected)
        inits = [None] * rows


def test_it_chooses_the_cpu_samplers_tokens() -> None:
    compare(0, rows=12, steps=3, vocab=VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_it_chooses_the_cpu_samplers_tokens_for_any_settings(seed: int) -> None:
    compare(seed, rows=40, steps=4, vocab=[257, 1000, 2049][seed % 3])


def test_a_sequence_without_settings_is_an_error() -> None:
    for sampler in samplers():
        with pytest.raises(ValueError, match="without ever having been given its settings"):
            sampler.sample(torch.zeros(1, VOCAB), [row(1, None)], None)


def test_dropped_sequences_begin_anew() -> None:
    init = replace(GREEDY, repetition_penalty=2.0, seen_token_ids=(5,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 4.0, 3.0
    for sampler in samplers():
        assert sampler.sample(logits.clone(), [row(1, init)], None)[0].token_ids == (6,)
        sampler.drop((1, 99))
        fresh = replace(init, seen_token_ids=())
        assert sampler.sample(logits.clone(), [row(1, fresh)], None)[0].token_ids == (5,)
        assert sampler.sample(logits.clone(), [row(1, None, 11)], None)[0].token_ids == (6,)


def test_rows_whose_logits_are_no_numbers_have_no_token() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2, 9] = float("nan"), float("inf")
    batch = [row(i, GREEDY) for i in range(3)]
    cpu, kernel = samplers()
    expected = cpu.sample(logits.clone(), batch, None)
    assert [output.token_ids for output in expected[1:]] == [(), ()]
    with np.errstate(invalid="ignore"):  # the interpreter computes in NumPy
        assert_same(kernel.sample(logits, batch, None), expected)


def test_rows_that_masks_and_bans_leave_nothing_have_no_token() -> None:
    ended = replace(GREEDY, banned_token_ids=(9,), min_tokens=100)
    only_nine = bytes(1) + b"\x02" + bytes(-(-VOCAB // 8) - 2)
    batch, masks = [row(0, GREEDY), row(1, ended), row(2, GREEDY)], [bytes(-(-VOCAB // 8)), only_nine, only_nine]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    cpu, kernel = samplers()
    expected = cpu.sample(logits.clone(), batch, masks)
    assert [output.token_ids for output in expected] == [(), (), (9,)]
    assert_same(kernel.sample(logits, batch, masks), expected)


def test_a_row_that_is_no_number_leaves_the_penalties_of_others_alone() -> None:
    penalised = replace(GREEDY, repetition_penalty=2.0)
    inits = [replace(penalised, temperature=1.0, top_k=1), penalised]
    cpu, kernel = samplers()
    broken, after = torch.zeros(2, VOCAB), torch.zeros(2, VOCAB)
    broken[0, 5] = float("nan")
    broken[1, 3] = after[1, VOCAB - 1] = 2.0
    after[1, 5] = 1.5
    batch = [row(i, init) for i, init in enumerate(inits)]
    expected = cpu.sample(broken.clone(), batch, None)
    with np.errstate(invalid="ignore"):
        assert_same(kernel.sample(broken, batch, None), expected)
    survivor = [row(1, None, 11)]
    assert_same(kernel.sample(after[1:], survivor, None), cpu.sample(after[1:].clone(), survivor, None))
