"""Sampling: the interpreted kernel chooses the reference's tokens, which are the CPU sampler's, and the right often."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.worker.noise import Purpose, gumbel_noise, noise_key
from pdserve_kernels.sampling import kernel, reference
from pdserve_kernels.sampling.reference import RowSettings
from pdserve_kernels.sampling.scores import CONTROLS, KNOBS

pytestmark = pytest.mark.usefixtures("poisoned")

Floats = NDArray[np.float32]
SETTINGS = (
    RowSettings(),
    RowSettings(temperature=0.0),
    RowSettings(top_k=1),
    RowSettings(top_k=7, temperature=1.5),
    RowSettings(top_p=0.8, temperature=0.7),
    RowSettings(top_p=0.02),
    RowSettings(min_p=0.1),
    RowSettings(top_k=40, top_p=0.5, min_p=0.02),
    RowSettings(repetition_penalty=1.3, banned=(3, 4)),
    RowSettings(frequency_penalty=0.2, presence_penalty=0.4, top_p=0.9),
    RowSettings(repetition_penalty=0.7, temperature=0.0, banned=(0,)),
)


def penalised(row: RowSettings) -> bool:
    return (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) != (1, 0, 0)


def run(
    logits: Floats,
    rows: Sequence[RowSettings],
    streams: Sequence[int],
    positions: Sequence[int],
    *,
    history: NDArray[np.int32] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[list[int], torch.Tensor]:
    """The kernel's tokens and logprobs; history, (rows, vocab), is changed."""
    knobs, controls = np.zeros((len(rows), KNOBS), np.float32), np.zeros((len(rows), CONTROLS), np.int64)
    banned = np.zeros((len(rows), 2), np.int32)
    for i, row in enumerate(rows):
        knobs[i] = (
            row.temperature,
            row.repetition_penalty,
            row.frequency_penalty,
            row.presence_penalty,
            row.top_p,
            row.min_p,
        )
        history_row = i if history is not None and penalised(row) else -1
        controls[i] = (streams[i], positions[i], row.top_k, history_row, allowed is not None, len(row.banned))
        banned[i, : len(row.banned)] = row.banned
    tokens, logprobs = kernel.sample(
        torch.from_numpy(logits),
        torch.from_numpy(knobs),
        torch.from_numpy(controls),
        history=None if history is None else torch.from_numpy(history),
        allowed=None if allowed is None else torch.from_numpy(packed(allowed)),
        banned=torch.from_numpy(banned),
    )
    return tokens.tolist(), logprobs


def packed(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


def logits_of(rng: np.random.Generator, rows: int, vocab: int, *, step: float = 0.0) -> Floats:
    """Normal logits; with a step on a grid, so that many are equal."""
    drawn = rng.standard_normal((rows, vocab)) * 3
    return (np.round(drawn / step) * step if step else drawn).astype(np.float32)


def check(vocab: int, *, rounds: int, step: float, masked: bool = False) -> None:
    rng, count = np.random.default_rng(vocab), len(SETTINGS)
    for position in range(rounds):
        logits = logits_of(rng, count, vocab, step=step)
        history = np.where(rng.random((count, vocab)) < 0.2, rng.integers(0, 6, (count, vocab)), 0).astype(np.int32)
        allowed = rng.random((count, vocab)) < 0.5 if masked else None
        streams = [reference.noise_stream(seed, position) for seed in rng.integers(0, 2**63, count).tolist()]
        expected = [
            reference.choose(
                reference.adjusted(
                    logits[i], history[i] if penalised(row) else None, None if allowed is None else allowed[i], row
                ),
                row,
                reference.noise_key(streams[i], position),
            )
            for i, row in enumerate(SETTINGS)
        ]
        counted = history.copy()
        for i, row in enumerate(SETTINGS):
            counted[i, expected[i]] += 2 * penalised(row)
        tokens, logprobs = run(logits, SETTINGS, streams, [position] * count, history=history, allowed=allowed)
        assert tokens == expected
        assert np.array_equal(history, counted)
        plain = torch.from_numpy(logits).double().log_softmax(1).gather(1, torch.tensor(expected)[:, None])
        torch.testing.assert_close(logprobs.double(), plain.squeeze(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["all different", "many equal"])
def test_it_chooses_the_references_tokens(step: float) -> None:
    check(301, rounds=2, step=step)
    check(301, rounds=1, step=step, masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [41, 1024, 8193])
def test_it_chooses_the_references_tokens_from_any_vocabulary(vocab: int) -> None:
    check(vocab, rounds=1, step=0.25)
    check(vocab, rounds=1, step=0.0, masked=True)


def test_logits_may_be_of_16_bits() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(logits_of(rng, 2, 200)).to(torch.bfloat16)
    knobs, controls = torch.tensor([[1.0, 1, 0, 0, 1, 0]] * 2), torch.zeros(2, CONTROLS, dtype=torch.int64)
    controls[:, 3] = -1
    tokens, _ = kernel.sample(logits, knobs, controls)
    wide_tokens, _ = kernel.sample(logits.float(), knobs, controls)
    assert torch.equal(tokens, wide_tokens)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_keys_and_noise_are_those_of_the_cpu_sampler(seed: int, sample_index: int, position: int) -> None:
    ours = reference.noise_key(reference.noise_stream(seed, sample_index), position)
    key = noise_key(seed, sample_index, position, Purpose.TOKEN)
    assert ours == key % 2**64
    noise = gumbel_noise(torch.tensor([key]), 70)[0].numpy()
    np.testing.assert_allclose(reference.gumbel_noise(ours, 70), noise, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "row", [RowSettings(), RowSettings(top_p=0.75, temperature=1.3), RowSettings(top_k=9, min_p=0.05)], ids=str
)
def test_the_references_draws_have_their_distribution(row: RowSettings) -> None:
    assert_drawn_from_the_distribution(row, 60_000, by_kernel=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [RowSettings(), RowSettings(top_p=0.75, temperature=1.3), RowSettings(top_k=9, min_p=0.05)], ids=str
)
def test_the_kernels_draws_have_their_distribution(row: RowSettings) -> None:
    assert_drawn_from_the_distribution(row, 250, by_kernel=True)


def assert_drawn_from_the_distribution(row: RowSettings, draws: int, *, by_kernel: bool) -> None:
    """Pearson's χ² over 30 tokens stays below its mean plus six deviations: six in a billion for a right sampler, and
    the seed is fixed."""
    logits = logits_of(np.random.default_rng(4), 1, 30)
    scores = logits[0].astype(np.float64)
    stream = reference.noise_stream(11, 0)
    if by_kernel:
        everywhere = np.repeat(logits, draws, axis=0)
        chosen, _ = run(everywhere, [row] * draws, [stream] * draws, range(draws))
    else:
        keys = [reference.noise_key(stream, position) for position in range(draws)]
        noise = gumbel_noise(torch.tensor([k - 2**64 if k >> 63 else k for k in keys]), 30).numpy()
        scaled = scores / row.temperature
        chosen = np.where(reference.kept(scaled, row), scaled + noise, -np.inf).argmax(axis=1).tolist()
    probabilities = reference.distribution(scores, row)
    counts = np.bincount(chosen, minlength=30)
    assert not counts[probabilities == 0].any()
    # Rare tokens together, so that every cell expects at least five.
    rare = probabilities * draws < 5
    expected = np.append(probabilities[~rare], probabilities[rare].sum()) * draws
    observed = np.append(counts[~rare], counts[rare].sum())
    cells = expected > 0
    freedom = max(cells.sum() - 1, 1)
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_a_wrong_distribution_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.distribution
    monkeypatch.setattr(reference, "distribution", lambda scores, row: right(scores, replace(row, temperature=1.15)))
    with pytest.raises(AssertionError):
        assert_drawn_from_the_distribution(RowSettings(), 60_000, by_kernel=False)


def test_a_row_that_may_choose_nothing_chooses_the_first_token() -> None:
    row = RowSettings(top_p=0.5)
    nothing = np.zeros((1, 50), np.bool_)
    tokens, _ = run(np.ones((1, 50), np.float32), [row], [5], [0], allowed=nothing)
    assert tokens == [0]


def test_no_rows_are_no_work_and_settings_of_another_shape_are_refused() -> None:
    knobs, controls = torch.zeros(0, KNOBS), torch.zeros(0, CONTROLS, dtype=torch.int64)
    tokens, logprobs = kernel.sample(torch.zeros(0, 50), knobs, controls)
    assert tokens.shape == logprobs.shape == (0,)
    with pytest.raises(ValueError, match="for each row"):
        kernel.sample(torch.zeros(1, 50), knobs, controls)
