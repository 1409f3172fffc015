"""A transfer backend whose reads a test can hold back, fail or damage."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Event

from pdserve.transfer.base import ReadPlan, Transfer, TransferBackend, TransferState
from pdserve.transfer.memory import HostMemory, KVMemory


class FaultyBackend:
    """Wraps a backend. A held read starts nothing until released, and then writes late, like a frozen peer's."""

    def __init__(self, inner: TransferBackend) -> None:
        self.name = inner.name
        self.inner = inner
        self.free = Event()
        self.free.set()
        """While unset, posting a read takes its time."""
        self.held = False
        """While set, posted reads stay in progress."""
        self.refusal = ""
        """While set, held reads end with this error, without having written."""
        self.refused: set[int] = set()
        """Of these reads alone, counted from 1 in the order in which they were posted, that is the end."""
        self.damages = 0
        """So many of the next reads deliver one wrong byte."""
        self.digests = True
        """Unset, what arrives is not digested as it comes, as with a network card."""
        self.posted = 0
        self.closed = False
        self.connected: list[str] = []
        self.disconnected: list[str] = []

    def register(self, memory: KVMemory) -> None:
        assert isinstance(memory, HostMemory)
        self.memory = memory
        self.inner.register(memory)

    def metadata(self) -> bytes:
        return self.inner.metadata()

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        connected = self.inner.connect(peer_id, metadata)
        self.connected.append(peer_id)
        return connected

    def post(self, peer_id: str, plan: ReadPlan) -> Transfer:
        self.posted += 1
        self.free.wait()
        return _FaultyTransfer(self, peer_id, plan, self.posted)

    def disconnect(self, peer_id: str) -> None:
        self.disconnected.append(peer_id)
        self.inner.disconnect(peer_id)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


@dataclass
class _FaultyTransfer:
    backend: FaultyBackend
    peer_id: str
    plan: ReadPlan
    number: int
    inner: Transfer | None = None
    error: str = ""

    def cancel(self) -> None:
        """Like NIXL's: the read goes on."""

    def poll(self) -> TransferState:
        if self.inner is None:
            if self.backend.refusal:
                self.error = self.backend.refusal
                return TransferState.ERROR
            if self.number in self.backend.refused:
                self.error = "this read was refused"
                return TransferState.ERROR
            if self.backend.held:
                return TransferState.IN_PROGRESS
            along = self.backend.digests and not self.backend.damages
            plan = self.plan if along else replace(self.plan, digest=None)
            self.inner = self.backend.inner.post(self.peer_id, plan)
        state = self.inner.poll()
        self.error = self.inner.error
        if state is TransferState.DONE and self.backend.damages:
            self.backend.damages -= 1
            self.backend.memory.array[int(self.plan.local[-1] + self.plan.lengths[-1]) - 1] ^= 0x40
        return state
