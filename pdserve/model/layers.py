"""The layers of a decoder block, built for one configuration and one rank.

Heads and the MLP's inner columns are split among ranks: projections into them are column-parallel (each rank computes
its own outputs), projections out of them row-parallel (each rank computes a part of every output, and the parts are
summed). Everything else is computed by every rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdserve.attention.base import AttentionPlan
from pdserve.model.config import ModelConfig
from pdserve.model.linear import Linear, LinearMethod
from pdserve.model.norm import RMSNorm
from pdserve.model.ops import HeadNorms, LayerOps, Residual, Rotation
from pdserve.model.parallel import ParallelContext
from pdserve.model.sharding import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What every layer of a model is built with."""

    config: ModelConfig
    method: LinearMethod
    ops: LayerOps
    parallel: ParallelContext
    shard: Shard
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def norm(self, size: int) -> RMSNorm:
        return RMSNorm(self.empty(size), self.config.norm_eps)

    def linear(self, in_features: int, out_features: int, *, bias: bool) -> Linear:
        weight = self.empty(out_features, in_features)
        return Linear(weight, self.empty(out_features) if bias else None, self.method)

    def partial_linear(self, in_features: int, out_features: int, *, bias: bool) -> Linear:
        """Row-parallel: its outputs are summed over ranks, so rank 0 alone adds the bias."""
        return self.linear(in_features, out_features, bias=bias and self.parallel.rank == 0)


class Attention(nn.Module):
    """Grouped-query attention: fused projection, optional query/key norm, rotary, attention, output."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, shard = build.config, build.shard
        self.heads, self.kv_heads, self.head_dim = shard.num_heads, shard.num_kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = build.linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = build.partial_linear(self.heads * self.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = build.norm(config.head_dim) if config.qk_norm else None
        self.k_norm = build.norm(config.head_dim) if config.qk_norm else None
        self.norms: HeadNorms | None = None
        if self.q_norm is not None and self.k_norm is not None:
            self.norms = HeadNorms(query=self.q_norm, key=self.k_norm)
        self.parallel, self.ops = build.parallel, build.ops

    def forward(
        self, residual: Residual, norm: RMSNorm, rotation: Rotation, plan: AttentionPlan, kv: Tensor
    ) -> Residual:
        qkv, residual = self.ops.norm_linear(residual, norm, self.qkv)
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        attended = self.ops.attend(heads, self.norms, rotation, plan, kv)
        return self.ops.add_linear(residual, attended.flatten(1), self.output, self.parallel)

    __call__ = forward


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, columns = build.config, build.shard.num_columns
        self.gate_up = build.linear(config.hidden_size, 2 * columns, bias=config.mlp_bias)
        self.down = build.partial_linear(columns, config.hidden_size, bias=config.mlp_bias)
        self.parallel, self.ops = build.parallel, build.ops

    def forward(self, residual: Residual, norm: RMSNorm) -> Residual:
        gated, residual = self.ops.norm_gated(residual, norm, self.gate_up)
        return self.ops.add_linear(residual, gated, self.down, self.parallel)

    __call__ = forward


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.attention_norm = build.norm(build.config.hidden_size)
        self.attention = Attention(build)
        self.mlp_norm = build.norm(build.config.hidden_size)
        self.mlp = MLP(build)

    def forward(self, residual: Residual, rotation: Rotation, plan: AttentionPlan, kv: Tensor) -> Residual:
        residual = self.attention(residual, self.attention_norm, rotation, plan, kv)
        return self.mlp(residual, self.mlp_norm)

    __call__ = forward
