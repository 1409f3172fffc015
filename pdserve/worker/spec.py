"""What is needed to open a worker, as a value that can cross to another process."""

from dataclasses import dataclass
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.layout import KVOrder
from pdserve.tiers.spec import TierSpec

STEP_DEADLINE = 300.0
"""Seconds after which a step that has no tokens yet counts as the worker's death."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """One rank's place among the workers that compute a model together.

    They meet at a TCP port of rank 0's machine. listener is the descriptor of the socket that listens there: rank 0
    inherits it, the others have none. address is where the others reach this rank.
    """

    rank: int
    meeting: tuple[str, int]
    listener: int | None
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """The worker of one incarnation of an engine: one rank, or tensor_parallel of them.

    model is a checkpoint directory. device "auto" (cuda if there is one), "cpu", "cuda" or "cuda:N"; dtype "auto",
    "float32" or "bfloat16"; deterministic None means on CPU only; threads are torch's per operation.
    backends names transfer backends in order of preference; with none the worker exchanges no KV. host is the address
    at which peers reach this machine. num_blocks are those of the engine: each rank holds its heads of all of them.
    place is set where a rank is opened. tiers is where KV goes
    below the device pool; sizes are those of each rank.
    """

    model: Path
    engine_id: str
    epoch: int
    num_blocks: int
    block_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    order: KVOrder = KVOrder.BLOCK_MAJOR
    deterministic: bool | None = None
    threads: int = 1
    backends: tuple[str, ...] = ("nixl", "shared_memory", "grpc")
    host: str = "127.0.0.1"
    tensor_parallel: int = 1
    place: RankPlace | None = None
    tiers: TierSpec | None = None


def check_ranks(tensor_parallel: int, device: str) -> None:
    """Raise ConfigError for several ranks where they cannot compute together."""
    if tensor_parallel > 1 and device != "cpu":
        raise ConfigError(
            f"tensor_parallel {tensor_parallel}: several ranks compute together on cpu only, and this is {device}; "
            "set device to cpu, or tensor_parallel to 1"
        )
