"""Rows of host memory."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pdserve.tiers.arena import allocate_rows


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of the CUDA runtime is called, keeping books."""
    pinned: dict[int, int] = {}

    books = SimpleNamespace(pinned=pinned, current=0, registered_on=[], cudaHostUnregister=pinned.pop)

    def register(address: int, num_bytes: int, flags: int) -> int:
        pinned[address] = num_bytes
        books.registered_on.append(books.current)
        return 2 if num_bytes > 2**20 else 0

    @contextmanager
    def device(number: int) -> Iterator[None]:
        before, books.current = books.current, number
        yield
        books.current = before

    books.cudaHostRegister = register
    monkeypatch.setattr(torch.cuda, "cudart", lambda: books)
    monkeypatch.setattr(torch.cuda, "device", device)
    return books


def test_rows_are_writable_and_apart() -> None:
    rows = allocate_rows(3, 1000)
    rows[1] = 7
    assert rows.shape == (3, 1000)
    assert [int(row.sum()) for row in rows] == [0, 7000, 0]


def test_pinned_rows_are_let_go_with_their_last_view(runtime: SimpleNamespace) -> None:
    rows = allocate_rows(2, 5000, gpu=3)
    view = torch.from_numpy(rows[1])
    assert list(runtime.pinned.values()) == [10_000]
    assert (runtime.registered_on, runtime.current) == ([3], 0)
    del rows
    gc.collect()
    assert runtime.pinned
    del view
    gc.collect()
    assert not runtime.pinned


def test_memory_that_cannot_be_had_is_said_so(runtime: SimpleNamespace) -> None:
    with pytest.raises(MemoryError, match=r"cannot be pinned \(CUDA error 2\)"):
        allocate_rows(2**10, 2**12, gpu=3)
    with pytest.raises(MemoryError, match="not to be had"):
        allocate_rows(2**30, 2**30)
