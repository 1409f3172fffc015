"""Whether there are kernels for CPUs."""

import sys
from collections.abc import Iterator

import pytest

from pdserve.attention.arrays import have_cpu_kernels


@pytest.fixture
def asked_anew() -> Iterator[None]:
    have_cpu_kernels.cache_clear()
    yield
    have_cpu_kernels.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_a_numba_that_cannot_be_imported_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not have_cpu_kernels()
