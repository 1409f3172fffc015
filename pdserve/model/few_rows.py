"""Few rows times a weight that oneDNN has packed, with the bits of oneDNN's product of many rows.

The kernel (pdserve_kernels.cpu.product) reads oneDNN's own memory. How that is arranged and in which order oneDNN takes
sums is written nowhere, so both are tried: where a guess gives other bits than oneDNN, the kernel is not used.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

from pdserve.attention.arrays import MOST_SCRATCH_ROWS, Array, Scratch, as_array
from pdserve_kernels.cpu.product import product
from pdserve_kernels.cpu.tile_sums import GROUP, TILE, multiplies_bfloat16

MOST_ROWS = MOST_SCRATCH_ROWS
"""Beyond, oneDNN is as fast: over the products of the 0.5B shape on one core in float32."""

_PARTS = (512, 1024, 2048)
"""Lengths of parts of the depth that oneDNN has been seen to sum by themselves."""


class FewRows:
    """A packed weight of (width, depth) and its bias. part: how much of the depth is summed by itself. scratch: where
    results go, until the next one of the same width; None makes each anew."""

    def __init__(
        self, packed: Tensor, bias: Tensor | None, shape: tuple[int, int], part: int, scratch: Scratch | None = None
    ) -> None:
        self._packed = packed  # owns the memory of _weight
        self._weight = _memory(packed)
        self._width = shape[0]
        self._part = part
        self._biased = bias is not None
        self._bias = self._weight if bias is None else as_array(bias)
        self._scratch = scratch

    def apply(self, x: Tensor) -> Tensor:
        """(rows, depth) → (rows, width)."""
        shape = x.shape[0], self._width
        if self._scratch is None:
            out = x.new_empty(shape)
            x_array, out_array = as_array(x.contiguous()), as_array(out)
        else:
            out, out_array = self._scratch.empty("product", shape, x)
            x_array = self._scratch.array(x)
        product(x_array, self._weight, self._bias, self._biased, self._part, out_array)
        return out


def find_part(packed: Tensor, bias: Tensor | None, shape: tuple[int, int], x: Tensor, out: Tensor) -> int | None:
    """The part with which FewRows makes out of x, whatever the number of rows; None when none does. x may have more
    rows than MOST_ROWS."""
    width, depth = shape
    if torch.ops.mkldnn._nbytes(packed) != -(-width // TILE) * TILE * depth * x.element_size():
        return None
    if x.dtype is torch.bfloat16 and (depth % 2 or not multiplies_bfloat16()):
        return None
    for part in (depth, *(part for part in _PARTS if part < depth)):
        few = FewRows(packed, bias, shape, part)
        if torch.equal(few.apply(x), out) and all(torch.equal(few.apply(x[:n]), out[:n]) for n in range(1, GROUP)):
            return part
    return None


def _memory(packed: Tensor) -> Array:
    """What oneDNN keeps, flat; bfloat16 as int16."""
    address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return memory.view(np.float32 if packed.dtype is torch.float32 else np.int16)
