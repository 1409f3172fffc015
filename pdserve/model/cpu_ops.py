"""Layers on a CPU: what stands between their products, in kernels of one pass each (pdserve_kernels.cpu.layer)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.attention.arrays import Array, LayerMemories, Scratch, as_array, float32
from pdserve.attention.base import AttentionPlan
from pdserve.model.linear import Linear
from pdserve.model.norm import RMSNorm
from pdserve.model.ops import HeadNorms, Residual
from pdserve.model.parallel import ParallelContext
from pdserve.model.rope import Rotary
from pdserve_kernels.cpu.layer import rms_norm, rope_kv_write, silu_mul


@dataclass(frozen=True, slots=True)
class Turning:
    """A step's rotation: tables of all positions, and those of its rows."""

    cos: Array
    sin: Array
    positions: Array


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm as kernels take it."""

    module: RMSNorm
    weight: Array
    eps: np.float32


class CpuOps:
    """LayerOps for one core. scratch: that of the linear method, if it has one."""

    def __init__(self, scratch: Scratch) -> None:
        self._memories = LayerMemories()
        self._norms: dict[int, _Norm] = {}
        self._scratch = scratch

    def rotation(self, rotary: Rotary, positions: Tensor) -> Turning:
        return Turning(rotary.cos.numpy(), rotary.sin.numpy(), positions.numpy())

    def norm(self, residual: Residual, norm: RMSNorm) -> Tensor:
        out, known = torch.empty_like(residual.x), self._norm(norm)
        rms_norm(as_array(residual.x), known.weight, known.eps, as_array(out))
        return out

    def norm_linear(self, residual: Residual, norm: RMSNorm, linear: Linear) -> tuple[Tensor, Residual]:
        return linear(self._normed(residual, norm)), residual

    def norm_gated(self, residual: Residual, norm: RMSNorm, gate_up: Linear) -> tuple[Tensor, Residual]:
        both = gate_up(self._normed(residual, norm))
        out, array = self._scratch.empty("gated", (both.shape[0], both.shape[1] // 2), both)
        silu_mul(self._scratch.array(both), array)
        return out, residual

    def _normed(self, residual: Residual, norm: RMSNorm) -> Tensor:
        """norm, into memory that the next call overwrites."""
        x, known = residual.x, self._norm(norm)
        out, array = self._scratch.empty("normed", tuple(x.shape), x)
        rms_norm(as_array(x), known.weight, known.eps, array)
        return out

    def add_linear(self, residual: Residual, x: Tensor, linear: Linear, parallel: ParallelContext) -> Residual:
        return Residual(residual.x.add_(parallel.all_reduce(linear(x))))

    def attend(
        self, qkv: Tensor, norms: HeadNorms | None, rotation: Turning, plan: AttentionPlan, kv: Tensor
    ) -> Tensor:
        memory = self._memories.of(kv)
        shape = qkv.shape[0], qkv.shape[1] - 2 * memory.kv_heads, qkv.shape[2]
        (q, q_array), array = self._scratch.empty("queries", shape, qkv), as_array(qkv)
        if norms is None:
            # Any array of the type does for weights that are not read.
            query_weight = key_weight = array[0, 0]
            eps = float32(0)
        else:
            query, key = self._norm(norms.query), self._norm(norms.key)
            query_weight, key_weight, eps = query.weight, key.weight, query.eps
        rope_kv_write(
            array,
            rotation.positions,
            plan.slots.numpy(),
            rotation.cos,
            rotation.sin,
            query_weight,
            key_weight,
            norms is not None,
            eps,
            memory.elements,
            memory.block_stride,
            memory.kv_heads,
            memory.block_size,
            q_array,
        )
        return plan.attend(q, kv)

    def _norm(self, norm: RMSNorm) -> _Norm:
        """Of a norm whose weight is loaded; asked in every step, made once."""
        known = self._norms.get(id(norm))
        if known is None:
            known = self._norms[id(norm)] = _Norm(norm, as_array(norm.weight), float32(norm.eps))
        return known
