"""What a check of the way between two engines found, as a value that crosses wires as JSON."""

from dataclasses import dataclass
from enum import StrEnum


class Transport(StrEnum):
    """What really carried the bytes, by the counters of kernel and network cards rather than by configuration."""

    MEMORY = "memory"
    """Neither network: copied within one machine, through the kernel (CMA) or shared memory."""
    RDMA = "rdma"
    TCP = "tcp"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """Where a worker runs. boot_id is equal for processes of one machine; cma_refused says why the kernel would not let
    another process of this user copy from this one's memory, empty if it would."""

    boot_id: str
    versions: tuple[tuple[str, str], ...]
    rdma_devices: tuple[str, ...]
    cma_refused: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WireBytes:
    """Bytes this process's TCP sockets, and this machine's RDMA ports, have received so far."""

    tcp: int
    rdma: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCheck:
    """Verified reads of one size; medians, in seconds. wire and verify are parts of seconds."""

    num_bytes: int
    pulls: int
    seconds: float
    wire: float
    verify: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCheck:
    """One (source, target) pair. error is (code, message) of what ended the check early; what was found before stays.

    round_trip is the median of a small RPC, clock_offset how far the source's wall clock is ahead; both in seconds.
    """

    source: str
    target: str
    backend: str = ""
    transport: Transport = Transport.UNKNOWN
    round_trip: float | None = None
    clock_offset: float | None = None
    sizes: tuple[SizeCheck, ...] = ()
    source_facts: MachineFacts | None = None
    target_facts: MachineFacts | None = None
    error: tuple[str, str] | None = None
