"""The counter-based noise: a pure function of key and token id, distributed as it should be."""

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.request import MAX_SEED
from pdserve.worker.noise import Purpose, gumbel_noise, noise_key

seeds = st.integers(0, MAX_SEED)


def noise(key: int, count: int = 1000) -> torch.Tensor:
    return gumbel_noise(torch.tensor([key]), count)[0]


def splitmix64(key: int, token_id: int) -> float:
    """The token's uniform number by the published algorithm, in Python integers."""
    mask = 2**64 - 1
    z = (key + (token_id + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return ((z >> 12) + 0.5) / 2**52


@given(seeds)
def test_bits_are_those_of_splitmix64(seed: int) -> None:
    key = noise_key(seed, 0, 5, Purpose.TOKEN)
    uniform = torch.tensor([splitmix64(key, token_id) for token_id in range(100)], dtype=torch.float64)
    torch.testing.assert_close(noise(key, 100), -torch.log(-torch.log(uniform)))


@given(st.lists(seeds, min_size=1, max_size=9), st.integers(1, 200), st.integers(1, 200))
def test_noise_is_independent_of_batch_and_vocabulary_size(some: list[int], count: int, other: int) -> None:
    keys = [noise_key(seed, 0, 5, Purpose.TOKEN) for seed in some]
    together = gumbel_noise(torch.tensor(keys), count)
    width = min(count, other)
    assert all(torch.equal(row[:width], noise(key, other)[:width]) for row, key in zip(together, keys, strict=True))


def test_every_part_of_the_key_counts() -> None:
    keys = {noise_key(*parts, Purpose.TOKEN) for parts in product([0, 1, MAX_SEED], range(3), range(50))}
    assert len(keys) == 450
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_neighbouring_positions_are_uncorrelated() -> None:
    rows = gumbel_noise(torch.tensor([noise_key(1, 0, position, Purpose.TOKEN) for position in range(8)]), 20_000)
    correlation = torch.corrcoef(rows) - torch.eye(8)
    assert correlation.abs().max() < 0.03


def test_noise_follows_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov distance to exp(-exp(-x)); 200,000 draws stay below 0.0043 with probability 0.999."""
    values = noise(noise_key(3, 0, 0, Purpose.TOKEN), 200_000).sort().values
    distribution = torch.exp(-torch.exp(-values))
    empirical = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    assert (distribution - empirical).abs().max() < 0.0043
    assert values.isfinite().all()
