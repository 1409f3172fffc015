"""Workers of one user on one machine: the reader maps the peer's memfd read-only and copies."""

import fcntl
import mmap
import os
from concurrent.futures import Future
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import TransferFailed, Unsupported
from pdserve.core.msgpack import unpack
from pdserve.transfer.base import CONNECTED, ReadPlan
from pdserve.transfer.copying import Copied, copy_plan
from pdserve.transfer.memory import HEADER_BYTES, NONCE_BYTES, SEALS, HostMemory, KVMemory

_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _PeerMemory(msgspec.Struct, frozen=True):
    pid: _Number
    fd: _Number
    nbytes: Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
    nonce: bytes


_PEER_MEMORY = msgspec.msgpack.Decoder(_PeerMemory)


class SharedMemoryBackend:
    """Reads through /proc/<pid>/fd/<fd>. A mapping outlives its peer: what it held stays readable."""

    name = "shared_memory"

    def __init__(self) -> None:
        self._peers: dict[str, NDArray[np.uint8]] = {}

    def register(self, memory: KVMemory) -> None:
        if not isinstance(memory, HostMemory):
            raise Unsupported(f"the shared_memory transfer backend cannot serve {memory.kind} tensors; use nixl")
        self._memory = memory

    def metadata(self) -> bytes:
        memory = self._memory
        return msgspec.msgpack.encode(_PeerMemory(os.getpid(), memory.fd, memory.nbytes, memory.nonce))

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        try:
            self._peers[peer_id] = _map_peer(unpack(metadata, _PEER_MEMORY))
        except (OSError, ValueError) as error:
            raise TransferFailed(f"cannot map the memory of {peer_id}: {error}") from error
        return CONNECTED

    def post(self, peer_id: str, plan: ReadPlan) -> Copied:
        if peer_id not in self._peers:
            raise TransferFailed(f"the memory of {peer_id} is not mapped")
        return copy_plan(self._peers[peer_id], self._memory.array, plan)

    def disconnect(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)

    def close(self) -> None:
        self._peers.clear()


def _map_peer(peer: _PeerMemory) -> NDArray[np.uint8]:
    """The peer's KV bytes, read-only. Raises OSError or ValueError when they are not to be had."""
    # Should it be no memory but a pipe, opening it does not wait for a writer.
    fd = os.open(f"/proc/{peer.pid}/fd/{peer.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("it is not sealed against resizing")
        mapping = mmap.mmap(fd, HEADER_BYTES + peer.nbytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    if mapping[:NONCE_BYTES] != peer.nonce:
        raise ValueError(f"process {peer.pid} is another one than described itself, or on another machine")
    return np.frombuffer(mapping, dtype=np.uint8)[HEADER_BYTES:]
