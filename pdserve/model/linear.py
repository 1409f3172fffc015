"""Linear layers and the methods that apply them.

A method owns the arithmetic, so that quantized weights and adapters come as further methods. TiledLinear is
what makes results independent of the batch: a GEMM's rounding depends on its number of rows, so every GEMM it
issues has the same one.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

ROW_TILE = 16
"""Rows per GEMM of TiledLinear. On one AVX-512 core 16 costs least for decode batches of 1 to 8; 32 would gain a
quarter for long prefill chunks and lose half for decode."""


class LinearMethod(Protocol):
    """Applies a linear layer to (rows, in_features); rows is a multiple of row_tile."""

    @property
    def row_tile(self) -> int: ...

    def apply(self, layer: "Linear", x: Tensor) -> Tensor: ...


class PlainLinear:
    """One GEMM for all rows: fastest, and rounding depends on how many rows there are."""

    row_tile = 1

    def apply(self, layer: "Linear", x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias)


class TiledLinear:
    """GEMMs of exactly row_tile rows, so that a row's result never depends on the rest of the batch."""

    row_tile = ROW_TILE

    def apply(self, layer: "Linear", x: Tensor) -> Tensor:
        weight = layer.weight.t()
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, result in zip(torch.split(x, self.row_tile), torch.split(out, self.row_tile), strict=True):
            if layer.bias is None:
                torch.mm(rows, weight, out=result)
            else:
                torch.addmm(layer.bias, rows, weight, out=result)
        return out


class Linear(nn.Module):
    """weight (out_features, in_features) and bias (out_features,) or None, as the loader fills them.

    x (rows, in_features) → (rows, out_features).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, method: LinearMethod) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


def pad_rows(x: Tensor, tile: int) -> Tensor:
    """Append zero rows until their number is a multiple of tile."""
    missing = -x.shape[0] % tile
    return pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x
