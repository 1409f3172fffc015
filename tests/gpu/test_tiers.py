"""The tiers of a worker on a GPU: the contract of every tier service, over pinned host memory."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from pdserve.core.layout import KVOrder
from pdserve.tiers.arena import allocate_rows
from pdserve.worker.service import WorkerMode, open_worker
from tests.contract.test_tier_services import (
    Subject,
    checkpoint,
    spec_of,
    test_blocks_come_back_bit_by_bit_up_to_the_first_that_is_missing,
    test_lists_that_do_not_pair_up_are_refused,
    test_what_the_host_tier_gave_up_comes_back_from_disk,
)

__all__ = [
    "checkpoint",
    "test_blocks_come_back_bit_by_bit_up_to_the_first_that_is_missing",
    "test_lists_that_do_not_pair_up_are_refused",
    "test_what_the_host_tier_gave_up_comes_back_from_disk",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODES: list[tuple[WorkerMode, KVOrder]] = [
    ("inproc", KVOrder.BLOCK_MAJOR),
    ("inproc", KVOrder.LAYER_MAJOR),
    ("process", KVOrder.BLOCK_MAJOR),
]


@pytest_asyncio.fixture(params=MODES)
async def subject(
    checkpoint: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Subject]:
    mode, order = request.param
    spec = replace(spec_of(checkpoint, tmp_path, order), device="cuda", backends=("nixl",))
    worker = await open_worker(spec, mode)
    yield Subject(worker)
    await worker.close()


def test_rows_for_a_gpu_are_pinned_and_can_be_so_again() -> None:
    for _ in range(20):
        rows = allocate_rows(3, 4096 * 5, gpu=0)
        assert torch.from_numpy(rows[1]).is_pinned()
        del rows
