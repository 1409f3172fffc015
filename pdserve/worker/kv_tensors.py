"""A worker's KV memory as tensors."""

import torch
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.core.layout import KVLayout
from pdserve.model.loader import DTYPES


class KVTensors:
    """The paged memory a KVLayout describes: one flat byte tensor and a strided view per layer.

    With a buffer the memory lies there (CPU only); it must be writable, hold layout.total_bytes and stay open
    as long as this object or any view lives. Without one it is allocated. It starts zeroed either way.
    """

    def __init__(self, layout: KVLayout, *, device: torch.device, buffer: memoryview | None = None) -> None:
        self.layout = layout
        self.memory = _memory(layout.total_bytes, device, buffer)
        """(total_bytes,) uint8."""
        self.memory.zero_()
        group = layout.group
        elements = self.memory.view(DTYPES[group.dtype])
        shape = (layout.num_blocks, 2, group.num_kv_heads, layout.block_size, group.head_dim)
        block, layer, *inner = layout.strides
        self.layers: tuple[Tensor, ...] = tuple(
            elements.as_strided(shape, (block, *inner), index * layer) for index in range(group.num_layers)
        )
        """Per layer (num_blocks, 2, kv_heads, block_size, head_dim), strided."""


def _memory(total_bytes: int, device: torch.device, buffer: memoryview | None) -> Tensor:
    if buffer is None:
        return torch.empty(total_bytes, dtype=torch.uint8, device=device)
    if device.type != "cpu":
        raise ConfigError(f"KV memory in a host buffer needs device cpu, not {device}")
    if buffer.readonly or buffer.nbytes < total_bytes:
        raise ConfigError(f"the KV buffer must be writable and hold {total_bytes} bytes; it holds {buffer.nbytes}")
    return torch.frombuffer(buffer, dtype=torch.uint8, count=total_bytes)
