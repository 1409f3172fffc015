"""KV on GPUs: digests through host copies, and NIXL reads from device memory into device memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdserve.core.endpoint import new_epoch
from pdserve.core.layout import KVOrder
from pdserve.core.protocols import PullSpec
from pdserve.worker.service import WorkerSpec, open_worker
from tests.checkpoints import make_checkpoint
from tests.contract.worker_batches import BLOCK_SIZE, PROMPT, prefill, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


async def test_workers_on_gpus_exchange_verified_kv(tmp_path: Path) -> None:
    base = WorkerSpec(
        model=make_checkpoint(tmp_path, "qwen3"),
        engine_id="p",
        epoch=new_epoch(),
        num_blocks=24,
        block_size=BLOCK_SIZE,
        device="cuda",
        backends=("nixl",),
    )
    source = await open_worker(base, "process")
    target = await open_worker(replace(base, engine_id="d", epoch=new_epoch(), order=KVOrder.LAYER_MAJOR), "process")
    try:
        blocks, targets = (7, 2, 11), (1, 0, 20)
        _ = [tokens async for tokens in run(source.executor, prefill(0, blocks))]
        digest = await source.transfer.digest(blocks, len(PROMPT), 5)
        assert await target.transfer.connect(source.transfer.address) == "nixl"
        spec = PullSpec(
            peer="p",
            epoch=base.epoch,
            source_blocks=blocks,
            target_blocks=targets,
            digest=digest,
            seed=5,
            deadline=10,
            start_within=10,
        )
        await target.transfer.pull(spec).wait()
        assert await target.transfer.digest(targets, len(PROMPT), 5) == digest
    finally:
        await target.close()
        await source.close()
