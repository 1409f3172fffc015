"""Paged attention in float64 NumPy: what the kernel must equal."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Indices = NDArray[np.int64]


def paged_attention(
    q: Array, kv: Array, block_tables: Indices, query_starts: Indices, kv_lens: Indices, scale: float
) -> NDArray[np.float64]:
    """q (tokens, heads, head_dim), sequences one after the other; kv (blocks, 2, kv_heads, block_size, head_dim);
    block_tables (sequences, blocks); query_starts (sequences + 1,); kv_lens (sequences,), this step's tokens included.

    Places of kv beyond a sequence's kv_len are not read. A token that sees no KV gets zeros.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = kv.shape[2:4]
    out = np.zeros((tokens, heads, head_dim))
    for sequence, kv_len in enumerate(kv_lens):
        first, end = query_starts[sequence], query_starts[sequence + 1]
        blocks = block_tables[sequence, : -(-kv_len // block_size)]
        keys, values = (
            kv[blocks, which].astype(np.float64).swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[:kv_len]
            for which in (0, 1)
        )
        for token in range(first, end):
            visible = max(0, kv_len - (end - 1 - token))
            grouped = q[token].astype(np.float64).reshape(kv_heads, heads // kv_heads, head_dim)
            scores = np.einsum("ngd,ind->ngi", grouped, keys[:visible]) * scale
            weights = np.exp(scores - scores.max(axis=-1, initial=-np.inf, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True) if visible else 1
            out[token] = np.einsum("ngi,ind->ngd", weights, values[:visible]).reshape(heads, head_dim)
    return out
