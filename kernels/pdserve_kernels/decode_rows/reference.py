"""The table of decoding sequences in NumPy."""

import numpy as np
from numpy.typing import NDArray

from pdserve_kernels.decode_rows.columns import (
    MIN_P,
    POSITION,
    STREAM,
    TABLE,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
)

Integers = NDArray[np.int64]


def decode_inputs(table: Integers, order: Integers, block_size: int) -> dict[str, NDArray[np.generic]]:
    """As the kernel's DecodeInputs."""
    real = order >= 0
    rows = np.maximum(order, 0)
    cells = np.where(real[:, None], table[rows], 0)
    positions = cells[:, POSITION]
    blocks = table[rows, TABLE + positions // block_size]
    numbers = cells.astype(np.int32).view(np.float32)
    none = np.zeros(len(order))
    knobs = (numbers[:, TEMPERATURE], none + 1, none, none, numbers[:, TOP_P], numbers[:, MIN_P])
    zero = np.zeros_like(positions)
    controls = (cells[:, STREAM], positions + 1, cells[:, TOP_K], zero - 1, zero, zero)
    return {
        "tokens": cells[:, TOKEN],
        "positions": positions,
        "slots": np.where(real, blocks * block_size + positions % block_size, -1),
        "kv_lens": np.where(real, positions + 1, 0),
        "table_rows": rows,
        "knobs": np.stack(knobs, axis=1).astype(np.float32),
        "controls": np.stack(controls, axis=1),
    }


def advance(
    table: Integers,
    order: Integers,
    tokens: Integers,
    logprobs: NDArray[np.floating],
    peaks: NDArray[np.floating],
    *,
    moves: bool,
) -> NDArray[np.float64]:
    """Changes the table; returns what the kernel does."""
    real = order >= 0
    table[order[real], TOKEN] = tokens[real]
    table[order[real], POSITION] += moves
    return np.stack((np.where(np.isfinite(peaks), tokens, -1).astype(np.float64), logprobs.astype(np.float64)))
