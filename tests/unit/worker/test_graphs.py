"""The order in which a CUDA graph is recorded, on streams that only write down what is asked of them; and staging."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
import torch

from pdserve.worker.graphs import CudaGraphs
from pdserve.worker.staging import Staging


class FakeStream:
    def __init__(self, said: list[str], name: str) -> None:
        self.device = torch.device("cpu")
        self._said, self._name = said, name

    def wait_stream(self, other: "FakeStream") -> None:
        self._said.append(f"{self._name} waits for {other._name}")

    def synchronize(self) -> None:
        self._said.append(f"host waits for {self._name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        said.append(f"on {stream._name}")
        yield
        said.append("off")

    @contextmanager
    def capture(graph: object, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        said.append(f"capture on {stream._name} in {pool}, {capture_error_mode}")
        yield
        said.append("captured")

    class FakeGraph:
        def replay(self) -> None:
            said.append("replayed")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(said, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(said, "steps"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    return said


def test_work_is_recorded_behind_what_made_its_data_and_replayed_with_the_results_of_its_recording(
    said: list[str],
) -> None:
    numbers = count()

    def work() -> int:
        said.append("work")
        return next(numbers)

    replay = CudaGraphs(torch.device("cpu")).record(work)
    assert said == [
        "side waits for steps",
        "on side",
        *["work"] * CudaGraphs.WARM_UPS,
        "off",
        "host waits for side",
        "capture on side in the pool, thread_local",
        "work",
        "captured",
        "host waits for side",
    ]
    assert [replay(), replay()] == [CudaGraphs.WARM_UPS] * 2
    assert said[-2:] == ["replayed"] * 2


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_arrays_that_are_copied_together_are_aligned_each(dtype: type[np.generic]) -> None:
    arrays = [np.arange(length).astype(dtype) for length in (1, 0, 3, 4, 5)]
    copies = Staging(torch.device("cpu")).to_device_together(arrays)
    for array, copied in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(copied.numpy(), array)
        assert not len(array) or copied.data_ptr() % 16 == 0
