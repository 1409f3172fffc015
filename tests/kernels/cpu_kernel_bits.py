"""Prints digests of what every CPU kernel computes, in every type it is compiled for."""

from hashlib import sha256

import numpy as np
import torch

from pdserve.attention.arrays import Array, LayerMemory, as_array, float32
from pdserve_kernels.cpu.attention import attend
from pdserve_kernels.cpu.layer import rms_norm, rope_kv_write, silu_mul
from tests.kernels.arrays import Draws

TOKENS, HEADS, KV_HEADS, DIM, BLOCK_SIZE = 7, 6, 2, 24, 16


def digest(array: Array) -> str:
    return sha256(array.tobytes()).hexdigest()[:16]


def layer_bits(draws: Draws) -> list[str]:
    x, weight, gate_up = draws.normal(3, 77), draws.normal(77), draws.normal(3, 154)
    normed, gated = as_array(torch.empty_like(x)), as_array(torch.empty_like(x))
    rms_norm(as_array(x), as_array(weight), float32(1e-6), normed)
    silu_mul(as_array(gate_up), gated)
    return [digest(normed), digest(gated)]


def attention_bits(draws: Draws, normed: bool) -> list[str]:
    kv = draws.normal(5, 2, KV_HEADS, BLOCK_SIZE, DIM)
    qkv, weight = draws.normal(TOKENS, HEADS + 2 * KV_HEADS, DIM), as_array(draws.normal(DIM))
    cos, sin = (as_array(draws.normal(64, DIM // 2, dtype=torch.float32)) for _ in range(2))
    memory, q = LayerMemory.of(kv), as_array(torch.empty(TOKENS, HEADS, DIM, dtype=draws.dtype))
    places = np.arange(40, 40 + TOKENS)
    shape = memory.elements, memory.block_stride, memory.kv_heads
    rope_kv_write(as_array(qkv), places, places, cos, sin, weight, weight, normed, float32(1e-6), *shape, BLOCK_SIZE, q)
    out, tables = np.empty_like(q), np.array([[4, 0, 2, 1]])
    attend(q, *shape, BLOCK_SIZE, tables, np.zeros(TOKENS, np.int64), places + 1, float32(0.2), out)
    return [digest(q), digest(memory.elements), digest(out)]


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        print(dtype, *layer_bits(Draws(1, dtype)), *attention_bits(Draws(2, dtype), True))
        print(dtype, *attention_bits(Draws(3, dtype), False))


if __name__ == "__main__":
    main()
