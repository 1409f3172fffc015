"""Random numbers as a function: what a sequence draws depends on its key and a token id, on nothing else.

Bits come from the SplitMix64 finaliser (https://doi.org/10.1145/2714064.2660195) in wrapping 64-bit integer
arithmetic, so they are the same on every device and in every batch.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_LANES = 64
"""Noise is computed in rows of a multiple of this width: the vector loops of a CPU round their scalar remainder
differently, and whether an element falls into it must not depend on its row."""


class Purpose(IntEnum):
    """What a number is drawn for; draws for different purposes are independent."""

    TOKEN = 0


def noise_key(seed: int, sample_index: int, position: int, purpose: Purpose) -> int:
    """A signed 64-bit key for one draw."""
    key = 0
    for part in (seed, sample_index, position, purpose):
        key = _mix_int((key + part + _GOLDEN) & _MASK)
    return _signed(key)


def gumbel_noise(keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise for token ids 0 … count - 1: keys (rows,) int64 → (rows, count) float64."""
    width = -(-count // _LANES) * _LANES
    steps = torch.arange(1, width + 1, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    bits = _logical_shift(_mix(keys[:, None] + steps), 12)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))[:, :count]


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    x = (x ^ _logical_shift(x, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return x ^ _logical_shift(x, _SHIFTS[2])


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> _SHIFTS[2])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
