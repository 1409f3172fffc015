"""A worker put together from a checkpoint directory."""

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdserve.core.batch import Batch, Row
from pdserve.core.layout import KVGroup, KVOrder
from pdserve.worker.worker import WorkerOptions, build_worker
from tests.checkpoints import make_checkpoint
from tests.stepping import GREEDY


@pytest.mark.parametrize("order", list(KVOrder))
def test_its_layout_is_the_models_in_the_options_blocks(tmp_path: Path, order: KVOrder) -> None:
    options = WorkerOptions(num_blocks=6, block_size=8, dtype="bfloat16", order=order)
    worker = build_worker(make_checkpoint(tmp_path, "llama"), options)
    worker.close()
    assert worker.layout.group == KVGroup(num_layers=2, num_kv_heads=2, head_dim=16, dtype="bfloat16")
    assert (worker.layout.num_blocks, worker.layout.block_size, worker.layout.order) == (6, 8, order)
    assert worker.layout.model_revision == worker.info.revision


def test_kv_is_written_into_the_allocated_memory_and_only_for_computed_tokens(tmp_path: Path) -> None:
    memory = bytearray()

    def allocate(num_bytes: int) -> memoryview:
        memory.extend(bytes(num_bytes))
        return memoryview(memory)

    options = WorkerOptions(num_blocks=4, block_size=8)
    worker = build_worker(make_checkpoint(tmp_path, "llama"), options, allocate=allocate)
    row = Row(
        sequence_id=1,
        start=0,
        num_tokens=11,
        token_ids=tuple(range(11)),
        block_ids=(2, 0),
        sample=True,
        sampler=replace(GREEDY, prompt_len=11),
    )

    async def compute() -> None:
        handle = worker.executor.forward(Batch(step=0, rows=(row,)))
        worker.executor.sample(handle)
        await worker.executor.collect(handle)

    asyncio.run(compute())
    worker.close()
    written = torch.frombuffer(memory, dtype=torch.float32).view(4, 2, 2, 2, 8, 16).ne(0).any(-1)
    assert written.shape == (4, 2, 2, 2, 8)
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2], expected[0, :3] = True, True
    assert torch.equal(written, expected[:, None, None, None, :].expand_as(written))


def test_running_a_model_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    """A bare GPU machine has neither the gateway's libraries nor those of tokenization."""
    make_checkpoint(tmp_path, "llama")
    absent = ["transformers", "tokenizers", "pydantic", "msgspec", "grpc", "xxhash", "fastapi"]
    program = (
        "import sys; from pathlib import Path\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "from pdserve.worker.worker import WorkerOptions, build_worker\n"
        f"build_worker(Path({str(tmp_path)!r}), WorkerOptions(num_blocks=4)).close()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
