"""Layers on a CPU: what stands between their products, in kernels of one pass each (pdserve_kernels.cpu.layer)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.attention.arrays import Array, LayerMemory, as_array, float32
from pdserve.attention.base import AttentionPlan
from pdserve.model.linear import Linear
from pdserve.model.norm import RMSNorm
from pdserve.model.ops import HeadNorms, Residual
from pdserve.model.parallel import ParallelContext
from pdserve.model.rope import Rotary
from pdserve_kernels.cpu.layer import rms_norm, rope_kv_write, silu_mul

_NO_WEIGHT = torch.empty(0)


@dataclass(frozen=True, slots=True)
class Turning:
    """A step's rotation: tables of all positions, and those of its rows."""

    cos: Array
    sin: Array
    positions: Array


class CpuOps:
    """LayerOps for one core."""

    def rotation(self, rotary: Rotary, positions: Tensor) -> Turning:
        return Turning(rotary.cos.numpy(), rotary.sin.numpy(), positions.numpy())

    def norm(self, residual: Residual, norm: RMSNorm) -> Tensor:
        out = torch.empty_like(residual.x)
        rms_norm(as_array(residual.x), as_array(norm.weight), float32(norm.eps), as_array(out))
        return out

    def norm_linear(self, residual: Residual, norm: RMSNorm, linear: Linear) -> tuple[Tensor, Residual]:
        return linear(self.norm(residual, norm)), residual

    def norm_gated(self, residual: Residual, norm: RMSNorm, gate_up: Linear) -> tuple[Tensor, Residual]:
        both = gate_up(self.norm(residual, norm))
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        silu_mul(as_array(both), as_array(out))
        return out, residual

    def add_linear(self, residual: Residual, x: Tensor, linear: Linear, parallel: ParallelContext) -> Residual:
        return Residual(residual.x.add_(parallel.all_reduce(linear(x))))

    def attend(
        self, qkv: Tensor, norms: HeadNorms | None, rotation: Turning, plan: AttentionPlan, kv: Tensor
    ) -> Tensor:
        memory = LayerMemory.of(kv)
        q = qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * memory.kv_heads, qkv.shape[2])
        query, key = (norms.query.weight, norms.key.weight) if norms else (_NO_WEIGHT, _NO_WEIGHT)
        rope_kv_write(
            as_array(qkv),
            rotation.positions,
            plan.slots.numpy(),
            rotation.cos,
            rotation.sin,
            as_array(query.to(qkv.dtype)),
            as_array(key.to(qkv.dtype)),
            norms is not None,
            float32(norms.query.eps if norms else 0),
            memory.elements,
            memory.block_stride,
            memory.kv_heads,
            memory.block_size,
            as_array(q),
        )
        return plan.attend(q, kv)
