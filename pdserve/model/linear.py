"""Linear layers and the methods that apply them.

A method owns the arithmetic, so that quantized weights and adapters come as further methods. TiledLinear and
PackedLinear (packed_linear.py) make results independent of the batch.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

ROW_TILE = 16
"""Rows per GEMM of TiledLinear: what costs least for decode batches of 1 to 8 on one AVX-512 core."""


class LinearMethod(Protocol):
    """Applies a linear layer to (rows, in_features)."""

    def padded(self, rows: int) -> int:
        """The number of rows, at least so many, that apply is to be given for them."""
        ...

    def apply(self, layer: "Linear", x: Tensor) -> Tensor: ...


class PlainLinear:
    """One GEMM for all rows: rounding depends on how many rows there are."""

    def padded(self, rows: int) -> int:
        return rows

    def apply(self, layer: "Linear", x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias)


class TiledLinear:
    """GEMMs of exactly ROW_TILE rows, so that a row's result never depends on the rest of the batch: rounding depends
    on a GEMM's number of rows."""

    def padded(self, rows: int) -> int:
        return -(-rows // ROW_TILE) * ROW_TILE

    def apply(self, layer: "Linear", x: Tensor) -> Tensor:
        weight = layer.weight.t()
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, result in zip(torch.split(x, ROW_TILE), torch.split(out, ROW_TILE), strict=True):
            if layer.bias is None:
                torch.mm(rows, weight, out=result)
            else:
                torch.addmm(layer.bias, rows, weight, out=result)
        return out


class Linear(nn.Module):
    """weight (out_features, in_features) and bias (out_features,) or None, as the loader fills them. packed is the
    weight in a method's own form; then weight is empty. kept: whether results outlive the layer that follows; the
    memory of others may be used again by the next product of their width.

    x (rows, in_features) → (rows, out_features).
    """

    packed: Any = None

    def __init__(self, weight: Tensor, bias: Tensor | None, method: LinearMethod, *, kept: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.method = method
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)

    __call__ = forward  # a module's own call looks for hooks first: at batch 1 it costs what a small kernel costs


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """Append zero rows until there are so many."""
    missing = rows - x.shape[0]
    return pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
