"""A torch.distributed communicator of exactly two ranks, for KV between one source and one target.

gloo carries host memory between machines over TCP. nccl is the same code with another group and staging
buffers on the GPU; NCCL refuses two ranks on one GPU, so it needs two of them.
"""

import socket
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pdserve.core.errors import ConfigError, Unsupported
from pdserve.transfer.memory import HostMemory, KVMemory, MemoryKind, TensorMemory

if TYPE_CHECKING:
    from torch import Tensor

GroupKind = Literal["gloo", "nccl"]

PIECE_BYTES = 1 << 21
SOURCE, TARGET = 0, 1
STALL = timedelta(seconds=5)
"""How long one piece may take before the communicator is given up. A pull's own deadline comes first."""


def memory_tensor(memory: KVMemory) -> "Tensor":
    """All bytes of a memory as one flat tensor over it. Raises Unsupported for a memory of another kind."""
    import torch

    match memory:
        case HostMemory():
            return torch.from_numpy(memory.array)
        case TensorMemory():
            return memory.tensor
    raise Unsupported(f"{type(memory).__name__} cannot be sent by torch.distributed")


def check_available(kind: GroupKind, memory: KVMemory) -> None:
    """Raises ConfigError when groups of this kind cannot carry this memory here."""
    dist = _distributed()
    if not dist.is_available() or not getattr(dist, f"is_{kind}_available")():
        raise ConfigError(f"this build of torch has no {kind}; choose another transfer backend")
    if kind == "nccl" and memory.kind is not MemoryKind.CUDA:
        raise ConfigError("the nccl transfer backend needs KV memory on a GPU; use gloo, nixl or grpc")


def staging(kind: GroupKind, memory: "Tensor", piece_bytes: int) -> "tuple[Tensor, Tensor]":
    """Two buffers where groups of this kind can reach them: one is filled while the other one is under way."""
    import torch

    device = memory.device if kind == "nccl" else torch.device("cpu")
    first, second = (torch.empty(piece_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return first, second


def finish_copies(memory: "Tensor") -> None:
    """Wait until what was copied into a memory on a GPU is there."""
    if memory.is_cuda:
        import torch

        torch.cuda.current_stream(memory.device).synchronize()


class Communicator:
    """One end of a pair. Once an operation failed or abort was called, it is of no more use."""

    def __init__(self, kind: GroupKind, host: str, rank: int, store: Any) -> None:
        self._group = _group(kind, host, rank, store)
        self._peer = SOURCE + TARGET - rank

    @classmethod
    def offer(cls, host: str) -> "tuple[int, Any]":
        """(port, store) of a new rendezvous on this machine, for the other end to join. Raises OSError."""
        listener = socket.create_server((host, 0))
        port = int(listener.getsockname()[1])
        store = _distributed().TCPStore(
            host, port, 2, True, STALL, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return port, store

    @classmethod
    def join(cls, kind: GroupKind, host: str, peer_host: str, port: int) -> "Communicator":
        """The target's end of a rendezvous. Raises RuntimeError when it does not come about in time."""
        return cls(kind, host, TARGET, _distributed().TCPStore(peer_host, port, 2, False, STALL))

    def send(self, piece: "Tensor") -> Any:
        """Begin to send; the bytes must stay until wait(work) has returned."""
        return self._group.send([piece], self._peer, 0)

    def receive(self, piece: "Tensor") -> Any:
        """Begin to receive exactly as many bytes."""
        return self._group.recv([piece], self._peer, 0)

    def wait(self, work: Any) -> None:
        """Until a send or receive is complete. Raises RuntimeError when the pair is broken or stalls."""
        work.wait(STALL)

    def abort(self) -> None:
        """Break off: nothing is sent or received on this communicator any more."""
        with suppress(RuntimeError):
            self._group.abort()


def _distributed() -> Any:
    """torch.distributed, whose stubs leave out most of what is used here."""
    import torch.distributed

    return torch.distributed


def _group(kind: GroupKind, host: str, rank: int, store: Any) -> Any:
    dist = _distributed()
    if kind == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = STALL
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = STALL
    return dist.ProcessGroupGloo(store, rank, 2, gloo)
