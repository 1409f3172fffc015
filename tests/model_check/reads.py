"""A transfer backend whose reads end when the model check says so: at once, late, in parts, damaged or never."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from pdserve.core.errors import TransferFailed
from pdserve.simulator.node import Node
from pdserve.transfer.base import CONNECTED, ReadPlan, TransferState
from pdserve.transfer.memory import HostMemory, KVMemory
from tests.model_check.device import LAYOUT


@dataclass(eq=False)
class Side:
    """One incarnation's memory, as reads reach it."""

    engine_id: str
    node: Node
    memory: HostMemory


@dataclass(eq=False)
class Read:
    """A read in flight. Bytes are those the source holds when they land, as with a network card."""

    source: Side
    target: Side
    plan: ReadPlan
    fabric: "Fabric"
    error: str = ""
    state: TransferState = TransferState.IN_PROGRESS

    @property
    def source_blocks(self) -> tuple[int, ...]:
        return _blocks(self.plan.remote, self.plan.lengths)

    @property
    def target_blocks(self) -> tuple[int, ...]:
        return _blocks(self.plan.local, self.plan.lengths)

    def poll(self) -> TransferState:
        return self.state

    def cancel(self) -> None:
        """It cannot be."""

    def land(self, share: float = 1.0) -> None:
        """Some of the bytes arrive."""
        self.fabric.on_land(self)
        spans = zip(self.plan.remote.tolist(), self.plan.local.tolist(), self.plan.lengths.tolist(), strict=True)
        for remote, local, length in spans:
            part = int(length * share)
            self.target.memory.array[local : local + part] = self.source.memory.array[remote : remote + part]

    def finish(self, *, damaged: bool = False) -> None:
        self.land()
        if damaged:
            self.target.memory.array[int(self.plan.local[0])] ^= 0x01
        self._end(TransferState.DONE)

    def fail(self, reason: str) -> None:
        self.error = reason
        self._end(TransferState.ERROR)

    def _end(self, state: TransferState) -> None:
        self.state = state
        self.fabric.reads.remove(self)
        if self.target.node.frozen:
            self.target.node.run(self.fabric.poll)
        else:
            self.fabric.poll()


@dataclass(eq=False)
class Fabric:
    """All reads in flight, and who is told of what happens to them."""

    on_post: Callable[[Read], None]
    on_land: Callable[[Read], None]
    poll: Callable[[], None]
    """Let the pumps look at their reads."""
    sides: dict[bytes, Side] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)


class Backend:
    """pdserve.transfer.base.TransferBackend over a Fabric."""

    name = "model"

    def __init__(self, fabric: Fabric, key: bytes, side: Side) -> None:
        self._fabric, self._key, self.side = fabric, key, side
        self._peers: dict[str, Side] = {}

    def register(self, memory: KVMemory) -> None:
        self._fabric.sides[self._key] = self.side

    def metadata(self) -> bytes:
        return self._key

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        self._peers[peer_id] = self._fabric.sides[metadata]
        return CONNECTED

    def post(self, peer_id: str, plan: ReadPlan) -> Read:
        if peer_id not in self._peers:
            raise TransferFailed(f"{peer_id} is not connected")
        read = Read(self._peers[peer_id], self.side, plan, self._fabric)
        self._fabric.reads.append(read)
        self._fabric.on_post(read)
        return read

    def disconnect(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)

    def close(self) -> None:
        self._peers.clear()


def _blocks(offsets: np.ndarray, lengths: np.ndarray) -> tuple[int, ...]:
    size = LAYOUT.block_bytes
    return tuple(
        block
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
        for block in range(offset // size, (offset + length) // size)
    )
