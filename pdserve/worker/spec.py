"""What is needed to open a worker, as a value that can cross to another process."""

from dataclasses import dataclass
from pathlib import Path

from pdserve.core.layout import KVOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One rank of one incarnation of an engine.

    model is a checkpoint directory. device "auto" (cuda if there is one), "cpu", "cuda" or "cuda:N"; dtype "auto",
    "float32" or "bfloat16"; deterministic None means on CPU only; threads are torch's per operation.
    backends names transfer backends in order of preference; with none the worker exchanges no KV. host is the address
    at which peers reach this machine.
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
