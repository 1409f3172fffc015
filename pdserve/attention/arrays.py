"""Tensors on a CPU as the arrays that its kernels take (pdserve_kernels.cpu)."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

MOST_SCRATCH_ROWS = 32


@cache
def have_cpu_kernels() -> bool:
    """Whether Numba, which compiles them, is installed and takes the NumPy beside it: a new one is often refused."""
    try:
        import_module("numba")
    except ImportError:
        return False
    return True


def as_array(tensor: Tensor) -> Array:
    """The same memory; bfloat16 as int16."""
    array: Array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """One layer's paged memory (num_blocks, 2, kv_heads, block_size, head_dim), as everything from its first block on:
    elements (n,), and the distance of two blocks in them."""

    elements: Array
    block_stride: int
    kv_heads: int
    block_size: int

    @classmethod
    def of(cls, kv: Tensor) -> "LayerMemory":
        """Raises ValueError unless a block's share is contiguous, as every KVLayout has it."""
        _, _, kv_heads, block_size, head_dim = kv.shape
        inner = (kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
        if kv.stride()[1:] != inner:
            raise ValueError(f"a layer's share of a block must be contiguous, not strided {kv.stride()[1:]}")
        size = kv.stride(0) * (kv.shape[0] - 1) + 2 * inner[0]
        elements = as_array(kv.as_strided((size,), (1,)))
        return cls(elements, kv.stride(0), kv_heads, block_size)


class LayerMemories:
    """LayerMemory.of tensors that live as long as this does: a worker's layers, looked at in every step."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, LayerMemory]] = {}

    def of(self, kv: Tensor) -> LayerMemory:
        known = self._known.get(id(kv))
        if known is None:
            # The tensor is kept, so that no other one can get its id.
            known = self._known[id(kv)] = kv, LayerMemory.of(kv)
        return known[1]


class Scratch:
    """Memory for what one step of a layer hands to the next: used again by every layer, and with the array beside the
    tensor, since making both costs more than many a kernel. Tensors of many rows are made anew."""

    def __init__(self) -> None:
        self._bases: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[Tensor, Array]] = {}
        self._arrays: dict[int, Array] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Array]:
        """(rows, …) of like's type, unwritten, until the next one for the same purpose and width. One Scratch serves
        one type."""
        known = self._parts.get((purpose, shape))
        if known is not None:
            return known
        if shape[0] > MOST_SCRATCH_ROWS:
            tensor = like.new_empty(shape)
            return tensor, as_array(tensor)
        key = purpose, shape[1:]
        if key not in self._bases:
            self._bases[key] = like.new_empty((MOST_SCRATCH_ROWS, *shape[1:]))
        tensor = self._bases[key][: shape[0]]
        part = self._parts[purpose, shape] = tensor, as_array(tensor)
        self._arrays[id(tensor)] = part[1]
        return part

    def array(self, tensor: Tensor) -> Array:
        """Of a tensor from here without work, of another made."""
        known = self._arrays.get(id(tensor))
        return as_array(tensor.contiguous()) if known is None else known


def float32(value: float) -> np.float32:
    """A scalar of the type kernels compute in."""
    return np.float32(value)
