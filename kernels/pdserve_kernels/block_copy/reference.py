"""Gather and scatter of KV blocks in NumPy."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


def gather_blocks(kv: NDArray[T], blocks: NDArray[np.int64], heads: tuple[int, int]) -> NDArray[T]:
    """kv (num_blocks, layers, 2, kv_heads, block_size, head_dim) → staging (blocks, layers, 2, heads, …)."""
    return np.ascontiguousarray(kv[blocks][:, :, :, heads[0] : heads[1]])


def scatter_blocks(staging: NDArray[T], kv: NDArray[T], blocks: NDArray[np.int64], heads: tuple[int, int]) -> None:
    kv[blocks, :, :, heads[0] : heads[1]] = staging
