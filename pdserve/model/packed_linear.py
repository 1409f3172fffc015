"""Products over weights that oneDNN has packed into the order in which it reads them.

Packed, a weight streams from memory at any number of rows, and a row's sum is taken in one order almost whatever that
number is. Almost: for deep weights a few rows may be split otherwise. So what may be used is found by trying it once,
when the model is loaded: which numbers of rows oneDNN gives the same bits, and whether our own kernel for few rows
(few_rows.py), which reads weights faster, gives them too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pdserve.attention.arrays import Scratch, have_cpu_kernels
from pdserve.core.errors import ConfigError
from pdserve.model.linear import Linear

if TYPE_CHECKING:
    from pdserve.model.few_rows import FewRows

ROW_SIZES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows per GEMM of oneDNN's. Each size is a kernel that it makes for each shape of weight, so there are few of them.
Fewer than four rows take it longer than four."""

_LARGEST = ROW_SIZES[-1]
_TRIED_OUTPUTS, _MOST_PIECES = 1 << 18, 8
"""Another order of sums shows in about one bfloat16 output of four thousand."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """oneDNN's own form of a weight, and the kernel for few rows over it, where that may be used."""

    tensor: Tensor
    few: "FewRows | None" = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """x (_LARGEST rows or a multiple, depth) and what a layer makes of it, _LARGEST rows at a time."""

    layer: Linear
    x: Tensor
    out: Tensor


class PackedLinear:
    """Products that give a row the same bits, whatever their number of rows."""

    def __init__(self, scratch: Scratch | None = None) -> None:
        self._scratch = Scratch() if scratch is None else scratch
        self._sizes: tuple[int, ...] = (_LARGEST,)
        self._most_few = 0

    def pack(self, linears: Iterable[Linear]) -> None:
        """Replace every layer's weight by its packed form and find the products that agree for all of them.

        Call it with as many threads of torch's as will apply them. Raises ConfigError when rows of one product differ
        by their place, which no processor is known to do."""
        shapes: dict[Linear, tuple[int, int]] = {}
        examples: dict[tuple[int, int], Linear] = {}
        for layer in linears:
            weight = layer.weight.data
            shapes[layer] = shape = weight.shape[0], weight.shape[1]
            examples.setdefault(shape, layer)
            layer.packed = PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight, _LARGEST))
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        trials = {shape: _try(layer, *shape) for shape, layer in examples.items()}
        self._most_few = _use_few_rows(shapes, trials, self._scratch)
        sizes = [size for size in ROW_SIZES if size > self._most_few]
        self._sizes = tuple(size for size in sizes if all(_agrees(trial, size) for trial in trials.values()))
        if _LARGEST not in self._sizes:
            raise ConfigError(
                "on this processor a row's place in a product changes its bits; set deterministic to false"
            )

    def padded(self, rows: int) -> int:
        if rows <= self._most_few:
            return rows
        whole, rest = divmod(rows, _LARGEST)
        return whole * _LARGEST + (next(size for size in self._sizes if size >= rest) if rest else 0)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._most_few and rows <= self._most_few:
            few: FewRows = layer.packed.few
            return few.apply(x)
        if rows <= _LARGEST:
            return _product(layer, x)
        return torch.cat([_product(layer, part) for part in torch.split(x, _LARGEST)])


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this build of torch multiply packed weights of a dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(layer: Linear, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.packed.tensor, layer.bias, "none", [], "")
    return product


@torch.inference_mode()
def _try(layer: Linear, width: int, depth: int) -> _Trial:
    pieces = min(_MOST_PIECES, -(-_TRIED_OUTPUTS // (_LARGEST * width)))
    x = torch.randn(pieces * _LARGEST, depth, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    return _Trial(layer, x, torch.cat([_product(layer, piece) for piece in torch.split(x, _LARGEST)]))


@torch.inference_mode()
def _agrees(trial: _Trial, size: int) -> bool:
    """Whether rows get the same bits among so many, and wherever they are."""
    pieces = zip(torch.split(trial.x, _LARGEST), torch.split(trial.out, _LARGEST), strict=True)
    return all(
        torch.equal(_product(trial.layer, x[:size]), out[:size])
        and torch.equal(_product(trial.layer, x[-size:].flip(0)).flip(0), out[-size:])
        for x, out in pieces
    )


@torch.inference_mode()
def _use_few_rows(
    shapes: Mapping[Linear, tuple[int, int]], trials: Mapping[tuple[int, int], _Trial], scratch: Scratch
) -> int:
    """Give every layer the kernel for few rows, if it agrees for all; the number of rows up to which it is used."""
    if torch.get_num_threads() > 1 or not have_cpu_kernels():
        return 0
    from pdserve.model.few_rows import MOST_ROWS, FewRows, find_part

    parts: dict[tuple[int, int], int] = {}
    for shape, trial in trials.items():
        part = find_part(trial.layer.packed.tensor, trial.layer.bias, shape, trial.x, trial.out)
        if part is None:
            return 0
        parts[shape] = part
    for layer, shape in shapes.items():
        tensor = layer.packed.tensor
        few = FewRows(tensor, layer.bias, shape, parts[shape], None if layer.kept else scratch)
        layer.packed = PackedWeight(tensor, few)
    return MOST_ROWS
