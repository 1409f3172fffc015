"""Inputs for kernels and their float64 twins."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WALL = 512


class Draws:
    """Reproducible normal tensors. Each lies within NaN, so that a read outside of it shows."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * scale
        return walled(drawn.to(dtype or self.dtype))


def walled(tensor: Tensor) -> Tensor:
    """A contiguous copy with NaN before and behind it."""
    memory = torch.full((tensor.numel() + 2 * _WALL,), float("nan"), dtype=tensor.dtype)
    inner = memory[_WALL : _WALL + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def assert_close(got: Tensor, expected: NDArray[np.float64], *, places: int = 1) -> None:
    """Within the rounding of got's dtype, `places` times over, relative to the largest value expected.

    Twice that for bfloat16: Triton's interpreter cuts off where hardware rounds to nearest.
    """
    unit = torch.finfo(got.dtype).eps * (2 if got.dtype is torch.bfloat16 else 8)
    np.testing.assert_allclose(wide(got), expected, rtol=0, atol=places * unit * max(np.abs(expected).max(), 1e-30))
