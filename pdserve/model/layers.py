"""The layers of a decoder block, built for one configuration and one rank.

Heads and the MLP's inner columns are split among ranks: projections into them are column-parallel (each rank computes
its own outputs), projections out of them row-parallel (each rank computes a part of every output, and the parts are
summed). Everything else is computed by every rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from pdserve.attention.base import AttentionPlan
from pdserve.model.config import ModelConfig
from pdserve.model.linear import Linear, LinearMethod
from pdserve.model.parallel import ParallelContext
from pdserve.model.rope import rotate
from pdserve.model.sharding import Shard

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What every layer of a model is built with."""

    config: ModelConfig
    method: LinearMethod
    parallel: ParallelContext
    shard: Shard
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(self, in_features: int, out_features: int, *, bias: bool) -> Linear:
        weight = self.empty(out_features, in_features)
        return Linear(weight, self.empty(out_features) if bias else None, self.method)

    def partial_linear(self, in_features: int, out_features: int, *, bias: bool) -> Linear:
        """Row-parallel: its outputs are summed over ranks, so rank 0 alone adds the bias."""
        return self.linear(in_features, out_features, bias=bias and self.parallel.rank == 0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean is taken in float32."""

    def __init__(self, build: Build, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(build.empty(size), requires_grad=False)
        self.eps = build.config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: fused projection, optional query/key norm, rotary, attention, output."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, shard = build.config, build.shard
        self.heads, self.kv_heads, self.head_dim = shard.num_heads, shard.num_kv_heads, config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = build.linear(config.hidden_size, width, bias=config.qkv_bias)
        self.output = build.partial_linear(self.heads * self.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(build, self.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(build, self.head_dim) if config.qk_norm else None
        self.parallel = build.parallel

    def forward(self, x: Tensor, rotation: Rotation, plan: AttentionPlan, kv: Tensor) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = plan.run(rotate(q, rotation), rotate(k, rotation), v, kv)
        return self.parallel.all_reduce(self.output(attended.flatten(1)))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        config, columns = build.config, build.shard.num_columns
        self.gate_up = build.linear(config.hidden_size, 2 * columns, bias=config.mlp_bias)
        self.down = build.partial_linear(columns, config.hidden_size, bias=config.mlp_bias)
        self.parallel = build.parallel

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.parallel.all_reduce(self.down(silu(gate) * up))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(build, build.config.hidden_size)
        self.attention = Attention(build)
        self.mlp_norm = RMSNorm(build, build.config.hidden_size)
        self.mlp = MLP(build)

    def forward(self, x: Tensor, rotation: Rotation, plan: AttentionPlan, kv: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, plan, kv)
        transformed: Tensor = self.mlp(self.mlp_norm(x))
        return x + transformed
