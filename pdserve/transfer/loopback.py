"""Workers in one process: the reader finds the peer's memory in a registry and copies."""

from concurrent.futures import Future
from secrets import token_bytes

from pdserve.core.errors import TransferFailed, Unsupported
from pdserve.transfer.base import CONNECTED, ReadPlan
from pdserve.transfer.copying import Copied, copy_plan
from pdserve.transfer.memory import HostMemory, KVMemory

LoopbackFabric = dict[bytes, HostMemory]
"""The memories that reach each other, by token."""

PROCESS_FABRIC: LoopbackFabric = {}
"""What every loopback backend joins unless it is given another fabric."""


class LoopbackBackend:
    name = "loopback"

    def __init__(self, fabric: LoopbackFabric | None = None) -> None:
        self._fabric = PROCESS_FABRIC if fabric is None else fabric
        self._token = token_bytes(16)
        self._peers: dict[str, bytes] = {}

    def register(self, memory: KVMemory) -> None:
        if not isinstance(memory, HostMemory):
            raise Unsupported(f"the loopback transfer backend cannot serve {memory.kind} tensors; use nixl")
        self._memory = memory
        self._fabric[self._token] = memory

    def metadata(self) -> bytes:
        return self._token

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        if metadata not in self._fabric:
            raise TransferFailed(f"{peer_id} is not in this process")
        self._peers[peer_id] = metadata
        return CONNECTED

    def post(self, peer_id: str, plan: ReadPlan) -> Copied:
        remote = self._fabric.get(self._peers.get(peer_id, b""))
        if remote is None:
            raise TransferFailed(f"{peer_id} is not connected, or closed")
        return copy_plan(remote.array, self._memory.array, plan)

    def disconnect(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)

    def close(self) -> None:
        self._peers.clear()
        self._fabric.pop(self._token, None)
