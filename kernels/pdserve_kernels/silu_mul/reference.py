"""silu(gate) · up in NumPy, in float64."""

import numpy as np
from numpy.typing import NDArray


def silu_mul(gate_up: NDArray[np.floating]) -> NDArray[np.float64]:
    """gate_up (rows, 2 * width), gates first → (rows, width)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate is infinite, and its silu 0
        product: NDArray[np.float64] = gate / (1 + np.exp(-gate)) * up
    return product
