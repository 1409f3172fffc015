"""Device time of a kernel: many launches in one CUDA graph, over data that the L2 cache does not hold.

Where there is no GPU the same calls run interpreted and are timed by the clock: figures without meaning, by which the
suite is tried before it meets one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from pdserve.worker.graphs import CudaGraphs

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
COLD_BYTES = 256 << 20
"""Several times an H200's L2 cache (50 MB): launches in turn touch at least so much."""
MAX_SETS = 64
_REPLAYS = 15


@dataclass(frozen=True, slots=True)
class Seconds:
    """Per launch: the median of the replays, and the range from the fastest to the slowest as a part of it."""

    median: float
    spread: float


class Mark:
    """A point in the device's work."""

    def __init__(self) -> None:
        if HAS_GPU:
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._clock = time.perf_counter()

    def until(self, later: "Mark") -> float:
        """Seconds of device time; waits for the later one."""
        if not HAS_GPU:
            return later._clock - self._clock
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000


def wait() -> None:
    """For all work of the device."""
    if HAS_GPU:
        torch.cuda.synchronize()


def num_sets(num_bytes: int) -> int:
    """How many sets of data of one launch's size are needed for launches in turn to find L2 cold."""
    return min(MAX_SETS, max(1, -(-COLD_BYTES // num_bytes))) if HAS_GPU else 1


def device_seconds(launches: Sequence[Callable[[], object]]) -> Seconds:
    """One launch's time, each on another set of data."""
    replay = _recorded(launches)
    times = []
    for _ in range(_REPLAYS if HAS_GPU else 1):
        begin = Mark()
        replay()
        times.append(begin.until(Mark()) / len(launches))
    middle = median(times)
    return Seconds(middle, (max(times) - min(times)) / middle)


def _recorded(launches: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def work() -> None:
        for launch in launches:
            launch()

    return CudaGraphs(DEVICE).record(work) if HAS_GPU else work


def copy_bytes_per_second() -> float:
    """The ceiling: a device copy of 2 GiB, bytes read and written."""
    size = 2 << 30 if HAS_GPU else 1 << 20
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    return 2 * source.numel() / device_seconds([lambda: target.copy_(source)]).median


def read_bytes_per_second() -> float:
    """What reading alone reaches, by the faster of torch's reductions over 4 GiB."""
    data = torch.rand((1 << 30) if HAS_GPU else (1 << 18), dtype=torch.float32, device=DEVICE)
    return 4 * data.numel() / min(device_seconds([reduce]).median for reduce in (data.sum, data.amax))


def product_operations_per_second() -> float:
    """The other ceiling: a bf16 product of 8192³."""
    size = 8192 if HAS_GPU else 64
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return float(2 * size**3 / device_seconds([lambda: left @ right]).median)
