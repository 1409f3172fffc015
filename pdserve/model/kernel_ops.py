"""Layers in Triton kernels: a linear method and the steps around it, in as few launches as they allow.

Up to FEW_ROWS rows, a product takes its norm, gate and residual along, and a layer is six launches (docs/engine.md has
the list). Above, cuBLAS multiplies and the rest are kernels of their own.
"""

from torch import Tensor
from torch.nn.functional import linear as torch_linear

from pdserve.attention.base import AttentionPlan
from pdserve.model.linear import Linear
from pdserve.model.norm import RMSNorm
from pdserve.model.ops import HeadNorms, Residual
from pdserve.model.parallel import ParallelContext
from pdserve.model.rope import Rotary
from pdserve_kernels.fused_norm.kernel import add_norm
from pdserve_kernels.rope_kv_write import kernel as rope_kv_write
from pdserve_kernels.silu_mul.kernel import silu_mul
from pdserve_kernels.small_gemm.kernel import Workspace, small_gemm

FEW_ROWS = 256
"""The largest decode bucket. Weights decide the time of a product below about 184 rows on an H200 (roofline), and up
to here two row tiles share them through L2."""

Rotation = tuple[tuple[Tensor, Tensor], Tensor]
"""Tables of cosines and sines, and the positions to look up in them."""


class KernelLinear:
    """The linear method of few-row products. deterministic uses them, in one tiling, for any number of rows: a row's
    bits then depend on nothing else.

    All layers of a model share one workspace, so their products run one after the other.
    """

    def __init__(self, workspace: Workspace, *, deterministic: bool) -> None:
        self._workspace = workspace
        self._deterministic = deterministic

    def padded(self, rows: int) -> int:
        return rows

    def takes(self, rows: int) -> bool:
        """Whether so many rows are multiplied by the kernel, which alone can take a step's surroundings along."""
        return self._deterministic or rows <= FEW_ROWS

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self.product(layer, x) if self.takes(x.shape[0]) else torch_linear(x, layer.weight, layer.bias)

    def product(
        self,
        layer: Linear,
        x: Tensor,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        return small_gemm(
            x.contiguous(),
            layer.weight,
            self._workspace,
            bias=layer.bias,
            norm=None if norm is None else (norm.weight, norm.eps),
            gated=gated,
            residual=residual,
            deterministic=self._deterministic,
        )


class KernelOps:
    """LayerOps in kernels; method is that of the model's linear layers."""

    def __init__(self, method: KernelLinear) -> None:
        self._method = method

    def rotation(self, rotary: Rotary, positions: Tensor) -> Rotation:
        return (rotary.cos, rotary.sin), positions

    def norm(self, residual: Residual, norm: RMSNorm) -> Tensor:
        return add_norm(residual.x, residual.delta, norm.weight, norm.eps)

    def norm_linear(self, residual: Residual, norm: RMSNorm, linear: Linear) -> tuple[Tensor, Residual]:
        if residual.delta is None and self._method.takes(residual.x.shape[0]):
            return self._method.product(linear, residual.x, norm=norm), residual
        return linear(self.norm(residual, norm)), Residual(residual.x)

    def norm_gated(self, residual: Residual, norm: RMSNorm, gate_up: Linear) -> tuple[Tensor, Residual]:
        if residual.delta is None and self._method.takes(residual.x.shape[0]):
            return self._method.product(gate_up, residual.x, norm=norm, gated=True), residual
        return silu_mul(gate_up(self.norm(residual, norm))), Residual(residual.x)

    def add_linear(self, residual: Residual, x: Tensor, linear: Linear, parallel: ParallelContext) -> Residual:
        if parallel.world_size == 1 and self._method.takes(x.shape[0]):
            return Residual(self._method.product(linear, x, residual=residual.x))
        return Residual(residual.x, parallel.all_reduce(linear(x)))

    def attend(
        self, qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, plan: AttentionPlan, kv: Tensor
    ) -> Tensor:
        table, positions = rotation
        head_norms = None
        if norms is not None:
            query, key = norms.query, norms.key
            head_norms = rope_kv_write.HeadNorms(query=query.weight, key=key.weight, eps=query.eps)
        return plan.attend(rope_kv_write.rope_kv_write(qkv, positions, plan.slots, table, kv, head_norms), kv)
