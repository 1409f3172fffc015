"""Small arrays to the device and results back, without either waiting for the other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
"""Of addresses, in bytes: Triton compiles a kernel anew for pointers that are no multiples of it."""


class Staging:
    """Copies in the order of the current stream, through pinned memory. torch's pinned allocator keeps a buffer until
    the copy out of it has happened."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pins = device.type == "cuda"

    def to_device(self, array: NDArray[np.generic]) -> Tensor:
        """A copy on the device; the array may change once this returns."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self.device, non_blocking=True) if self._pins else host.clone()

    def to_device_together(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        """Copies of one-dimensional arrays of one dtype in one go, each aligned as memory of its own would be."""
        unit = _ALIGNMENT // arrays[0].itemsize
        ends = np.cumsum([-(-len(array) // unit) * unit for array in arrays]).tolist()
        whole = np.zeros(ends[-1], dtype=arrays[0].dtype)
        places = [slice(begin, begin + len(array)) for begin, array in zip([0, *ends], arrays, strict=False)]
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        staged = self.to_device(whole)
        return [staged[place] for place in places]

    def to_host(self, tensor: Tensor) -> Callable[[], NDArray[Any]]:
        """Begin to copy a result; what is returned waits for it, on whatever thread, and for all work before it."""
        if not self._pins:
            copied: NDArray[Any] = tensor.clone().numpy()
            return lambda: copied
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> NDArray[Any]:
            done.synchronize()
            arrived: NDArray[Any] = host.numpy()
            return arrived

        return wait
