"""Ranks of one model as threads of this process, over gloo."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import distributed

from pdserve.model.gloo import GlooRanks
from pdserve.model.parallel import ParallelContext, SingleRank
from tests.stepping import single_thread

TIMEOUT = 30.0
_T = TypeVar("_T")


def on_ranks(world_size: int, work: Callable[[ParallelContext], _T]) -> list[_T]:
    """Do work on every rank at the same time; the results by rank."""
    if world_size == 1:
        return [work(SingleRank())]
    store = distributed.HashStore()  # type: ignore[attr-defined]  # left out of the stubs of torch

    def run(rank: int) -> _T:
        single_thread()
        return work(GlooRanks(store, rank, world_size, "127.0.0.1", TIMEOUT))

    with ThreadPoolExecutor(world_size) as threads:
        return [future.result() for future in [threads.submit(run, rank) for rank in range(world_size)]]
