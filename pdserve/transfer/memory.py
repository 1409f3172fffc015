"""The memory that holds a worker's KV blocks, as transfers and digests see it."""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from secrets import token_bytes
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 4096
"""Before the KV bytes of a HostMemory lies one block of this size that begins with its nonce."""

NONCE_BYTES = 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class MemoryKind(StrEnum):
    HOST = "host"
    CUDA = "cuda"


class KVMemory(Protocol):
    """A contiguous range of bytes. Offsets count from its start."""

    @property
    def kind(self) -> MemoryKind: ...

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def device_id(self) -> int: ...

    def chunks(self, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of each span in order, as host arrays; valid until the next one is asked for."""
        ...

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Set the bytes from offset on; they must lie inside."""
        ...

    def zero(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """Set the bytes of a strided view to 0; strides are in bytes."""
        ...

    def close(self) -> None:
        """Give up the handle. The bytes live on while arrays or tensors over them do."""
        ...


class HostMemory:
    """Anonymous shared memory (memfd), so that workers of the same user on this machine can map it.

    It has no name in any file system: when the last process that maps it dies, however, it is gone. It is
    sealed against resizing, so that a reader's mapping cannot fault.
    """

    kind = MemoryKind.HOST
    device_id = 0

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.nonce = token_bytes(NONCE_BYTES)
        """Tells a reader that it opened this memory and not one of a process that got the same pid."""
        self.fd = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, HEADER_BYTES + nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            mapping = mmap.mmap(self.fd, HEADER_BYTES + nbytes)
        except OSError:
            os.close(self.fd)
            raise
        mapping[:NONCE_BYTES] = self.nonce
        self.array: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)[HEADER_BYTES:]
        """Shape [nbytes], writable; tensors are made over it."""

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    def chunks(self, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> Iterator[NDArray[np.uint8]]:
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            yield self.array[offset : offset + length]

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        self.array[offset : offset + len(data)] = data

    def zero(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        np.ndarray(shape, dtype=np.uint8, buffer=self.array, offset=offset, strides=strides)[...] = 0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class TensorMemory:
    """Memory that torch allocated: a contiguous one-dimensional uint8 tensor, on a GPU as a rule."""

    def __init__(self, tensor: "torch.Tensor") -> None:
        if tensor.dim() != 1 or tensor.element_size() != 1 or not tensor.is_contiguous():
            raise ValueError("KV memory must be a contiguous one-dimensional tensor of bytes")
        self.tensor = tensor
        """(nbytes,) uint8."""
        self.kind = MemoryKind.CUDA if tensor.is_cuda else MemoryKind.HOST
        self.device_id = tensor.device.index or 0
        self.nbytes = tensor.numel()
        self.address = tensor.data_ptr()
        self._stream = _new_stream(tensor) if tensor.is_cuda else None

    def chunks(self, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> Iterator[NDArray[np.uint8]]:
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            with self.beside_steps():
                chunk = self.tensor[offset : offset + length].cpu()
            yield chunk.numpy()

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        target = self.tensor[offset : offset + len(data)]
        with self.beside_steps():
            target.copy_(target.new_tensor(data, device="cpu"))

    def zero(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        with self.beside_steps():
            self.tensor.as_strided(shape, strides, offset).zero_()

    def beside_steps(self) -> AbstractContextManager[object]:
        """On a GPU, a stream of its own: what runs in it waits for no step in flight."""
        if self._stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self._stream)

    def close(self) -> None:
        """The tensor's owner frees it."""


def _new_stream(tensor: "torch.Tensor") -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(tensor.device, priority=-1)  # type: ignore[no-untyped-call]
