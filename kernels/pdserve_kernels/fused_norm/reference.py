"""Residual add and RMSNorm in NumPy, in float64 throughout."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def rms_norm(x: Array, weight: Array, eps: float) -> NDArray[np.float64]:
    """x (..., width), weight (width,)."""
    wide = x.astype(np.float64)
    normed: NDArray[np.float64] = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps)
    return normed * weight.astype(np.float64)


def add_norm(
    x: Array, delta: Array | None, weight: Array, eps: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(x + delta, its norm); x and delta (rows, width)."""
    total = x.astype(np.float64)
    if delta is not None:
        total = total + delta.astype(np.float64)
    return total, rms_norm(total, weight, eps)
