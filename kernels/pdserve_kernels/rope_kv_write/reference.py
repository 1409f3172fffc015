"""Query/key norm, rotary embedding and KV write in NumPy, in float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve_kernels.fused_norm.reference import rms_norm

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """Weights (head_dim,) of the norms of query and key heads."""

    query: Array
    key: Array
    eps: float


def rotated(x: NDArray[np.float64], cos: Array, sin: Array) -> NDArray[np.float64]:
    """x (tokens, heads, head_dim); cos, sin (tokens, head_dim / 2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def rope_kv_write(
    qkv: Array,
    positions: NDArray[np.int64],
    slots: NDArray[np.int64],
    table: tuple[Array, Array],
    kv: NDArray[np.float64],
    norms: HeadNorms | None,
) -> NDArray[np.float64]:
    """The turned queries (tokens, heads, head_dim), zero where a token's slot is negative; writes kv.

    qkv (tokens, heads + 2 * kv_heads, head_dim); table: cos, sin (positions, head_dim / 2);
    kv (num_blocks, 2, kv_heads, block_size, head_dim).
    """
    kv_heads, block_size = kv.shape[2], kv.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = np.split(qkv.astype(np.float64), (heads, heads + kv_heads), axis=1)
    if norms is not None:
        q, k = rms_norm(q, norms.query, norms.eps), rms_norm(k, norms.key, norms.eps)
    cos, sin = table[0][positions], table[1][positions]
    k = rotated(k, cos, sin)
    for token, slot in enumerate(slots):
        if slot >= 0:
            kv[slot // block_size, 0, :, slot % block_size] = k[token]
            kv[slot // block_size, 1, :, slot % block_size] = v[token]
    return np.where(slots[:, None, None] >= 0, rotated(q, cos, sin), 0.0)
