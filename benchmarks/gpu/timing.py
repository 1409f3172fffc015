"""Device time of a kernel: many launches in one CUDA graph, over data that the L2 cache does not hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

COLD_BYTES = 256 << 20
"""Several times an H200's L2 cache (50 MB): launches in turn touch at least so much."""
MAX_SETS = 64
_REPLAYS = 15


@dataclass(frozen=True, slots=True)
class Seconds:
    """Per launch: the median of the replays, and the range from the fastest to the slowest as a part of it."""

    median: float
    spread: float


def num_sets(num_bytes: int) -> int:
    """How many sets of data of one launch's size are needed for launches in turn to find L2 cold."""
    return min(MAX_SETS, max(1, -(-COLD_BYTES // num_bytes)))


def device_seconds(launches: Sequence[Callable[[], object]]) -> Seconds:
    """One launch's time, each on another set of data."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(launches))
    middle = median(times)
    return Seconds(middle, (max(times) - min(times)) / middle)


def copy_bytes_per_second() -> float:
    """The ceiling: a device copy of 2 GiB, bytes read and written."""
    source, target = (torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.numel() / device_seconds([lambda: target.copy_(source)]).median


def product_operations_per_second() -> float:
    """The other ceiling: a bf16 product of 8192³."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return float(2 * 8192**3 / device_seconds([lambda: left @ right]).median)
