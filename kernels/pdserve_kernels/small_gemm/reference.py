"""A linear layer with its surroundings in NumPy, in float64."""

import numpy as np
from numpy.typing import NDArray

from pdserve_kernels.fused_norm.reference import rms_norm

Array = NDArray[np.floating]


def small_gemm(
    x: Array,
    weight: Array,
    *,
    bias: Array | None = None,
    norm: tuple[Array, float] | None = None,
    gated: bool = False,
    residual: Array | None = None,
) -> NDArray[np.float64]:
    """x (rows, depth), weight (columns, depth) → (rows, columns), half as many when gated. norm: weight and epsilon."""
    h = x.astype(np.float64) if norm is None else rms_norm(x, *norm)
    y: NDArray[np.float64] = h @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias
    if gated:
        gate, up = np.split(y, 2, axis=1)
        y = gate / (1 + np.exp(-gate)) * up
    return y if residual is None else residual.astype(np.float64) + y
