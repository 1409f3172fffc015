"""The contract of a transfer backend, and the life of a pull.

The owner of the destination posts reads; nobody writes into another worker's memory. Two-sided backends keep
that rule too: their source sends only what it was asked for, into a buffer of the target's choice.

A pull is POSTED, ARRIVED and VERIFIED, or else MISMATCHED, FAILED or QUARANTINED, and at last SETTLED: the lower
part of the state machine drawn in engine/handoff_target.py, as the service drives it.

wait() answers on entering VERIFIED, MISMATCHED, FAILED or QUARANTINED; settled() on SETTLED. While a pull is
POSTED or QUARANTINED its target blocks may be overwritten at any moment. A one-sided backend cannot cancel a
read in flight: neither releasing its handle nor dropping the peer stops the bytes. Where bytes pass
through our own hands before they reach the blocks, cancel is a fence and a quarantine ends at once.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pdserve.transfer.memory import KVMemory

Offsets = NDArray[np.uint64]

CONNECTED: "Future[None]" = Future()
CONNECTED.set_result(None)
"""What connect returns for a peer that is readable at once."""


def refused(connecting: "Future[None]") -> bool:
    """Whether a connect has ended without making the peer readable."""
    return connecting.done() and connecting.exception() is not None


class TransferState(Enum):
    """What poll found. DONE and ERROR are final: nothing is written any more."""

    IN_PROGRESS = "in_progress"
    DONE = "done"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class ArrivalDigest:
    """xxh3-128 of what a read has written to our memory, made while it is in the core's cache by a backend that copies
    with its own hands. seed has 64 bits; value stays empty where another has to make it; seconds is what it took."""

    seed: int
    value: bytes = b""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    """Byte spans to read: lengths[i] bytes from remote[i] to local[i].

    The three arrays have shape [n] and count bytes from the start of the registered memories. in_order: the spans come
    in the order in which a region is digested.
    """

    local: Offsets
    remote: Offsets
    lengths: Offsets
    in_order: bool = False
    digest: ArrivalDigest | None = None
    """Of what arrives, wanted only for spans in order."""

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())


class Transfer(Protocol):
    """A posted read. Used, like its backend, from one thread."""

    @property
    def error(self) -> str:
        """Why poll said ERROR, in words; empty before."""
        ...

    def poll(self) -> TransferState:
        """Look once. Never raises. Not called again after DONE or ERROR."""
        ...

    def cancel(self) -> None:
        """Nobody wants the bytes any more: end early if that can be done, for poll to tell. Never raises."""
        ...


class TransferBackend(Protocol):
    """Moves bytes from peers' registered memory into ours.

    All calls come from one thread (see pump.py) and may block it for as long as a copy takes. A peer_id
    names one incarnation of a peer.
    """

    @property
    def name(self) -> str: ...

    def register(self, memory: KVMemory) -> None:
        """Start, and make memory readable to peers. Called once, before all else.

        Raises ConfigError when this backend cannot run here, and Unsupported for this kind of memory."""
        ...

    def metadata(self) -> bytes:
        """What a peer's connect needs to read our memory."""
        ...

    def connect(self, peer_id: str, metadata: bytes) -> "Future[None]":
        """Begin to make a peer readable; replaces what was connected under this peer_id. Never waits for the peer,
        because reads from others would wait, too: the future ends once it is readable (CONNECTED where that is at
        once), or with TransferFailed. Raises TransferFailed, and MalformedMessage for metadata that is none."""
        ...

    def post(self, peer_id: str, plan: ReadPlan) -> Transfer:
        """Start reading; may return with the transfer already over. Raises TransferFailed when nothing
        was started (peer not connected, span out of range)."""
        ...

    def disconnect(self, peer_id: str) -> None:
        """Forget a peer that has no transfer in progress; an unknown one is ignored."""
        ...

    def close(self) -> None:
        """Free everything. No transfer is in progress."""
        ...
