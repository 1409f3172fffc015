"""Products over weights that oneDNN has packed into the order in which it reads them.

Packed, a weight streams from memory at any number of rows, and a row's sum is taken in one order almost whatever that
number is. Almost: for deep weights a few rows may be split otherwise. So the numbers of rows that may be used are found
by trying them once, when the model is loaded.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pdserve.core.errors import ConfigError
from pdserve.model.linear import Linear

ROW_SIZES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows per GEMM. Each size is a kernel that oneDNN makes for each shape of weight, so there are few of them. Fewer than
four rows take longer than four: over the products of a 25M model on one core 7.9, 9.4 and 6.3 ms for 1, 2 and 4."""

_LARGEST = ROW_SIZES[-1]


class PackedLinear:
    """GEMMs of row sizes that all give a row the same bits."""

    def __init__(self) -> None:
        self._sizes: tuple[int, ...] = (_LARGEST,)

    def pack(self, linears: Iterable[Linear]) -> None:
        """Replace every layer's weight by its packed form and find the row sizes that agree for all of them.

        Call it with as many threads of torch's as will apply them. Raises ConfigError when rows of one product differ
        by their place, which no processor is known to do."""
        agreed, tried = set(ROW_SIZES), set[tuple[int, int]]()
        for layer in linears:
            width, shape = layer.weight.shape[1], (layer.weight.shape[0], layer.weight.shape[1])
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, _LARGEST)
            dtype = layer.weight.dtype
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
            if shape not in tried:
                tried.add(shape)
                agreed &= _agreeing_sizes(layer, width, dtype)
        if _LARGEST not in agreed:
            raise ConfigError(
                "on this processor a row's place in a product changes its bits; set deterministic to false"
            )
        self._sizes = tuple(sorted(agreed))

    def padded(self, rows: int) -> int:
        whole, rest = divmod(rows, _LARGEST)
        return whole * _LARGEST + (next(size for size in self._sizes if size >= rest) if rest else 0)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        if x.shape[0] <= _LARGEST:
            return _product(layer, x)
        return torch.cat([_product(layer, rows) for rows in torch.split(x, _LARGEST)])


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch multiply packed weights of a dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(layer: Linear, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "none", [], "")
    return product


@torch.inference_mode()
def _agreeing_sizes(layer: Linear, width: int, dtype: torch.dtype) -> set[int]:
    """Row sizes whose first and last rows get the bits they get among _LARGEST, if those do not depend on place."""
    x = torch.randn(_LARGEST, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = _product(layer, x)
    if not torch.equal(_product(layer, x.flip(0)).flip(0), expected):
        return set()
    return {
        size
        for size in ROW_SIZES
        if torch.equal(_product(layer, x[:size]), expected[:size])
        and torch.equal(_product(layer, x[-size:]), expected[-size:])
    }
