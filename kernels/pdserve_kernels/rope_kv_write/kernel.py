"""Query/key norm, rotary embedding and KV write in Triton: one program per token and few heads."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS_PER_PROGRAM = 4


@triton.jit
def rope_kv_write_kernel(
    qkv_ptr: tl.tensor,
    position_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    block_size: tl.tensor,
    block_stride: tl.int64,
    kind_stride: tl.int64,
    head_stride: tl.int64,
    slot_stride: tl.int64,
    eps: tl.tensor,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """qkv [tokens, heads + 2 * kv_heads, DIM] and q [tokens, heads, DIM], contiguous; cos, sin [positions, DIM / 2].

    kv is one layer of paged memory, its strides in elements. Tokens with a negative slot are padding: their q is
    zero, and they write no KV.
    """
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_BLOCK)
    is_query = head < heads
    is_value = head >= heads + kv_heads
    inside = (head < heads + 2 * kv_heads)[:, None] & (column < HALF)[None, :]
    slot = tl.load(slot_ptr + token)
    is_real = (slot + tl.zeros((HEADS,), tl.int64)) >= 0  # one per head: the interpreter's masks mix with no scalar
    position = tl.load(position_ptr + token)
    source = qkv_ptr + (token * (heads + 2 * kv_heads) + head[:, None]) * DIM + column[None, :]
    raw_first = tl.load(source, mask=inside, other=0)
    raw_second = tl.load(source + HALF, mask=inside, other=0)
    dtype = q_ptr.dtype.element_ty
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM
        scale = (1.0 / tl.sqrt(mean + eps))[:, None]
        weight_first = _of_kind(query_weight_ptr, key_weight_ptr, is_query, column, HALF)
        weight_second = _of_kind(query_weight_ptr + HALF, key_weight_ptr + HALF, is_query, column, HALF)
        # Rounded after each factor, as a norm of its own would.
        first = ((first * scale).to(dtype).to(tl.float32) * weight_first).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * weight_second).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + column, mask=column < HALF, other=0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + column, mask=column < HALF, other=0)[None, :]
    out_first = tl.where(is_value[:, None], raw_first, (first * cos - second * sin).to(dtype))
    out_second = tl.where(is_value[:, None], raw_second, (second * cos + first * sin).to(dtype))

    q = q_ptr + (token * heads + head[:, None]) * DIM + column[None, :]
    to_q = inside & is_query[:, None]
    zero = tl.zeros((HEADS, HALF_BLOCK), dtype=dtype)
    tl.store(q, tl.where(is_real[:, None], out_first, zero), mask=to_q)
    tl.store(q + HALF, tl.where(is_real[:, None], out_second, zero), mask=to_q)

    kind = tl.where(is_value, 1, 0).to(tl.int64)
    kv_head = (head - heads - kind * kv_heads).to(tl.int64)
    place = (slot // block_size) * block_stride + (slot % block_size) * slot_stride
    kv = kv_ptr + place + (kind * kind_stride + kv_head * head_stride)[:, None] + column[None, :]
    to_kv = inside & ((head >= heads) & is_real)[:, None]
    tl.store(kv, out_first, mask=to_kv)
    tl.store(kv + HALF, out_second, mask=to_kv)


@triton.jit
def _of_kind(
    query_ptr: tl.tensor, key_ptr: tl.tensor, is_query: tl.tensor, column: tl.tensor, HALF: tl.constexpr
) -> tl.tensor:
    query = tl.load(query_ptr + column, mask=column < HALF, other=0).to(tl.float32)
    key = tl.load(key_ptr + column, mask=column < HALF, other=0).to(tl.float32)
    return tl.where(is_query[:, None], query[None, :], key[None, :])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """Weights (head_dim,) of the norms of query and key heads."""

    query: Tensor
    key: Tensor
    eps: float


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: tuple[Tensor, Tensor],
    kv: Tensor,
    norms: HeadNorms | None,
) -> Tensor:
    """The turned queries (tokens, heads, head_dim), zero in padding; writes keys and values to kv.

    qkv (tokens, heads + 2 * kv_heads, head_dim), contiguous; positions, slots (tokens,) int64, a negative slot is
    padding; table: cos, sin (positions, head_dim / 2) float32;
    kv (num_blocks, 2, kv_heads, block_size, head_dim) of qkv's dtype, any strides but 1 along head_dim.
    """
    tokens, all_heads, dim = qkv.shape
    if dim % 2 or kv.shape[4] != dim or kv.stride(4) != 1 or not qkv.is_contiguous():
        raise ValueError("qkv must be contiguous, heads even and as long as those of kv, which are contiguous each")
    if positions.shape != (tokens,) or slots.shape != (tokens,):
        raise ValueError(f"{tokens} tokens need as many positions and slots")
    if kv.dtype is not qkv.dtype:
        raise ValueError(f"kv holds {kv.dtype}, the projection gave {qkv.dtype}")
    kv_heads, block_size = kv.shape[2], kv.shape[3]
    heads = all_heads - 2 * kv_heads
    q = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        rope_kv_write_kernel[(tokens, triton.cdiv(all_heads, HEADS_PER_PROGRAM))](
            qkv,
            positions,
            slots,
            *table,
            norms.query if norms else qkv,
            norms.key if norms else qkv,
            q,
            kv,
            heads,
            kv_heads,
            block_size,
            *kv.stride()[:4],
            norms.eps if norms else 0.0,
            DIM=dim,
            HALF_BLOCK=triton.next_power_of_2(dim // 2),
            HEADS=HEADS_PER_PROGRAM,
            NORM=norms is not None,
            num_warps=num_warps(dim),
        )
    return q


def num_warps(dim: int) -> int:
    """Two for the four heads of a program, four where heads are long."""
    return 4 if dim > 128 else 2
