"""Work that is launched again and again with the same shapes and addresses: recorded once, then replayed.

On a GPU a replay is one launch however many kernels were recorded. Elsewhere it is the work itself, so that all that
surrounds graphs (buckets, padding, persistent rows) is tested without a GPU.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], T]
"""Does the work once more, on the current stream. On a GPU the result is the same memory every time."""


class Recorder(Protocol):
    """Records work that takes no arguments: what changes between replays it reads from tensors it always finds at the
    same address, and it neither waits for the device nor looks at values."""

    def record(self, work: Callable[[], T]) -> Replay[T]:
        """Does the work, too, at least once. Its tensors must live as long as the replay is used."""
        ...


class Eager:
    """Replays by doing the work."""

    def record(self, work: Callable[[], T]) -> Replay[T]:
        work()
        return work


class CudaGraphs:
    """CUDA graphs that share one memory pool: they are replayed one after the other on one stream, so what one needs
    only while it runs serves the others, too."""

    WARM_UPS = 2
    """The first compiles kernels and grows workspaces; the second shows that nothing is left to do."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T]) -> Replay[T]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for _ in range(self.WARM_UPS):
                work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Transfers of other threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        self._stream.synchronize()

        def replay() -> T:
            graph.replay()
            return result

        return replay


def recorder(device: torch.device) -> Recorder:
    """What a device has."""
    return CudaGraphs(device) if device.type == "cuda" else Eager()
