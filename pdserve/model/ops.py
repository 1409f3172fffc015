"""What a decoder layer computes between its weights and attention, in the steps a GPU would run as one kernel each.

The seam between layers and arithmetic: layers say what follows what, LayerOps how it is computed. A loader chooses one
implementation for the whole model: TorchOps runs everywhere, KernelOps (kernel_ops.py) on GPUs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from pdserve.attention.base import AttentionPlan
from pdserve.model.linear import Linear
from pdserve.model.norm import RMSNorm
from pdserve.model.parallel import ParallelContext
from pdserve.model.rope import Rotary, rotate

Rotation = Any
"""A step's positions, in the form an implementation of LayerOps turns heads by; only it looks inside."""


class Residual(NamedTuple):
    """The residual stream, x (rows, hidden_size), and what may still have to be added to it."""

    x: Tensor
    delta: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """The norms of query and key heads."""

    query: RMSNorm
    key: RMSNorm


class LayerOps(Protocol):
    """Steps of a decoder layer. A Residual that was passed to one must not be used again: its memory may be."""

    def rotation(self, rotary: Rotary, positions: Tensor) -> Rotation:
        """(rows,) positions, prepared once per step."""
        ...

    def norm(self, residual: Residual, norm: RMSNorm) -> Tensor: ...

    def norm_linear(self, residual: Residual, norm: RMSNorm, linear: Linear) -> tuple[Tensor, Residual]:
        """linear(norm(stream)), (rows, out_features), and the stream."""
        ...

    def norm_gated(self, residual: Residual, norm: RMSNorm, gate_up: Linear) -> tuple[Tensor, Residual]:
        """silu(gate) * up of gate_up(norm(stream)), half its out_features wide, and the stream."""
        ...

    def add_linear(self, residual: Residual, x: Tensor, linear: Linear, parallel: ParallelContext) -> Residual:
        """The stream plus linear(x), summed over ranks."""
        ...

    def attend(
        self, qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, plan: AttentionPlan, kv: Tensor
    ) -> Tensor:
        """Norm and turn queries and keys, write keys and values to kv, and attend.

        qkv (rows, heads + 2 * kv_heads, head_dim), kv as for AttentionPlan.run → (rows, heads, head_dim).
        """
        ...


class TorchOps:
    """Every step in torch's operations."""

    def rotation(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.at(positions)

    def norm(self, residual: Residual, norm: RMSNorm) -> Tensor:
        normed: Tensor = norm(residual.x)
        return normed

    def norm_linear(self, residual: Residual, norm: RMSNorm, linear: Linear) -> tuple[Tensor, Residual]:
        return linear(norm(residual.x)), residual

    def norm_gated(self, residual: Residual, norm: RMSNorm, gate_up: Linear) -> tuple[Tensor, Residual]:
        gate, up = gate_up(norm(residual.x)).chunk(2, dim=-1)
        return silu(gate) * up, residual

    def add_linear(self, residual: Residual, x: Tensor, linear: Linear, parallel: ParallelContext) -> Residual:
        return Residual(residual.x + parallel.all_reduce(linear(x)))

    def attend(
        self, qkv: Tensor, norms: HeadNorms | None, rotation: tuple[Tensor, Tensor], plan: AttentionPlan, kv: Tensor
    ) -> Tensor:
        kv_heads = kv.shape[2]
        q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            q, k = norms.query(q), norms.key(k)
        return plan.run(rotate(q, rotation), rotate(k, rotation), v, kv)
