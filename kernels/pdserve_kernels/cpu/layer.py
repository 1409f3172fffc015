"""What stands between a layer's products, one pass each: norm, rotary embedding with KV write, gate."""

from typing import Any

import numpy as np

from pdserve_kernels.cpu.elements import compiled, exponential, inlined, narrow, widen


@compiled
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """x, out (rows, width), weight (width,)."""
    rows, width = x.shape
    for row in range(rows):
        wide, result = x[row], out[row]
        squares = np.float32(0)
        for j in range(width):
            squares += widen(wide[j]) * widen(wide[j])
        scale = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        for j in range(width):
            result[j] = narrow(widen(wide[j]) * scale * widen(weight[j]), out)


@compiled
def silu_mul(gate_up: Any, out: Any) -> None:
    """gate_up (rows, 2 * width), gates first; out (rows, width)."""
    rows, width = out.shape
    for row in range(rows):
        gates, ups, result = gate_up[row, :width], gate_up[row, width:], out[row]
        for j in range(width):
            gate = widen(gates[j])
            result[j] = narrow(gate / (np.float32(1) + exponential(-gate)) * widen(ups[j]), out)


@inlined
def _turn(head: Any, weight: Any, normed: Any, eps: Any, cos: Any, sin: Any, turned: Any) -> None:
    """A query or key head (dim,), normed if it is, turned by its position, as float32."""
    half = len(head) // 2
    scale = np.float32(1)
    if normed:
        squares = np.float32(0)
        for j in range(2 * half):
            squares += widen(head[j]) * widen(head[j])
        scale = np.float32(1) / np.sqrt(squares / np.float32(2 * half) + eps)
    for j in range(2 * half):
        factor = scale * widen(weight[j]) if normed else scale
        turned[j] = widen(head[j]) * factor
    for j in range(half):
        first, second = turned[j], turned[half + j]
        turned[j] = first * cos[j] - second * sin[j]
        turned[half + j] = second * cos[j] + first * sin[j]


@compiled
def rope_kv_write(
    qkv: Any,
    positions: Any,
    slots: Any,
    cos: Any,
    sin: Any,
    query_weight: Any,
    key_weight: Any,
    normed: Any,
    eps: Any,
    memory: Any,
    block_stride: Any,
    kv_heads: Any,
    block_size: Any,
    q: Any,
) -> None:
    """qkv (rows, heads + 2 * kv_heads, dim); the first len(slots) rows are tokens and the rest padding, whose queries
    become zero. cos, sin (positions, dim / 2) float32; weights (dim,), read if normed; memory as for attend; q (rows,
    heads, dim) receives the turned queries."""
    rows, heads, dim = q.shape
    head_size = block_size * dim
    turned = np.empty(dim, np.float32)
    for row in range(len(slots)):
        angle_cos, angle_sin = cos[positions[row]], sin[positions[row]]
        for head in range(heads):
            _turn(qkv[row, head], query_weight, normed, eps, angle_cos, angle_sin, turned)
            for j in range(dim):
                q[row, head, j] = narrow(turned[j], q)
        at = slots[row] // block_size * block_stride + slots[row] % block_size * dim
        for kv_head in range(kv_heads):
            _turn(qkv[row, heads + kv_head], key_weight, normed, eps, angle_cos, angle_sin, turned)
            key = memory[at + kv_head * head_size : at + kv_head * head_size + dim]
            for j in range(dim):
                key[j] = narrow(turned[j], memory)
            value = memory[at + (kv_heads + kv_head) * head_size : at + (kv_heads + kv_head) * head_size + dim]
            new = qkv[row, heads + kv_heads + kv_head]
            for j in range(dim):
                value[j] = new[j]
    for row in range(len(slots), rows):
        for head in range(heads):
            for j in range(dim):
                q[row, head, j] = narrow(np.float32(0), q)
