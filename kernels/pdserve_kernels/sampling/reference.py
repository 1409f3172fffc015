"""The meaning of the sampling kernel in NumPy: exact in float64, one row at a time, by sorting."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

STEP = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB
TOKEN_PURPOSE = 0
_MASK = (1 << 64) - 1

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How one row is sampled; the defaults leave the distribution as it is."""

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    banned: tuple[int, ...] = field(default=())


def mixed(x: int) -> int:
    """SplitMix64's finalizer."""
    x = ((x ^ (x >> 30)) * FIRST_FACTOR) & _MASK
    x = ((x ^ (x >> 27)) * SECOND_FACTOR) & _MASK
    return x ^ (x >> 31)


def noise_stream(seed: int, sample_index: int) -> int:
    """What all draws of one sample of a request have in common; signed, 64 bits."""
    stream = mixed((mixed((seed + STEP) & _MASK) + sample_index + STEP) & _MASK)
    return stream - (1 << 64) if stream >> 63 else stream


def noise_key(stream: int, position: int) -> int:
    """Unsigned, 64 bits."""
    return mixed((mixed((stream + position + STEP) & _MASK) + TOKEN_PURPOSE + STEP) & _MASK)


def gumbel_noise(key: int, count: int) -> Scores:
    """Noise of tokens 0 … count - 1."""
    bits = np.array([mixed((key + token * STEP) & _MASK) >> 12 for token in range(1, count + 1)], dtype=np.float64)
    return -np.log(-np.log((bits + 0.5) * 2.0**-52))


def adjusted(
    logits: NDArray[np.floating], history: NDArray[np.int32] | None, allowed: NDArray[np.bool_] | None, row: RowSettings
) -> Scores:
    """One row's scores, (vocab,), before temperature."""
    scores = logits.astype(np.float64)
    if history is not None:
        penalty, outputs = row.repetition_penalty, history // 2
        scores = np.where(history > 0, np.where(scores < 0, scores * penalty, scores / penalty), scores)
        scores = scores - row.frequency_penalty * outputs - row.presence_penalty * (outputs > 0)
    scores[list(row.banned)] = -np.inf
    return scores if allowed is None else np.where(allowed, scores, -np.inf)


def kept(scores: Scores, row: RowSettings) -> NDArray[np.bool_]:
    """Which tokens top-k, top-p and min-p leave; scores after temperature."""
    order = np.argsort(scores, kind="stable")
    keep = scores > -np.inf
    if 0 < row.top_k < len(scores):
        keep &= scores >= scores[order[-row.top_k]]
    weights = np.where(keep, np.exp(scores - scores.max()), 0.0)
    if row.top_p < 1:
        below = np.empty_like(weights)
        below[order] = np.cumsum(weights[order])
        above = weights.sum() - below
        keep &= (above < row.top_p * weights.sum()) | (scores == scores.max()) & (above <= 0)
    return np.asarray(keep & (np.exp(scores - scores.max()) >= row.min_p))


def distribution(scores: Scores, row: RowSettings) -> Scores:
    """The probabilities a row is drawn from; scores before temperature, which is above 0."""
    scaled = scores / row.temperature
    weights = np.where(kept(scaled, row), np.exp(scaled - scaled.max()), 0.0)
    return np.asarray(weights / weights.sum())


def choose(scores: Scores, row: RowSettings, key: int) -> int:
    """The token; scores before temperature."""
    if row.temperature == 0:
        return int(scores.argmax())
    scaled = scores / row.temperature
    return int(np.where(kept(scaled, row), scaled + gumbel_noise(key, len(scores)), -np.inf).argmax())
