"""What only a worker process can do: die, freeze, outlive nobody, and keep its weight to itself."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import new_epoch
from pdserve.core.errors import EngineDied
from pdserve.core.protocols import PullSpec
from pdserve.transfer.base import ReadPlan
from pdserve.transfer.pump import Flight
from pdserve.worker import remote_main
from pdserve.worker.frames import Start, read_frame, write_frame
from pdserve.worker.link import CLOSE_DEADLINE
from pdserve.worker.local import LocalWorker
from pdserve.worker.service import WorkerHandle, WorkerSpec, open_worker
from tests.checkpoints import make_checkpoint
from tests.contract.processes import is_gone
from tests.contract.worker_batches import BLOCK_SIZE, prefill
from tests.pulls import PULL

BLOCKS = (0, 1, 2)
QUICK = replace(Times(), heartbeat=0.5, fence=2.0)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    path = make_checkpoint(tmp_path_factory.mktemp("worker"), "llama")
    return WorkerSpec(
        model=path,
        engine_id="p",
        epoch=new_epoch(),
        num_blocks=8,
        block_size=BLOCK_SIZE,
        backends=("shared_memory",),
    )


@pytest.fixture
async def worker(spec: WorkerSpec) -> AsyncIterator[WorkerHandle]:
    worker = await open_worker(spec, "process")
    yield worker
    await worker.close()


async def test_death_of_the_process_fails_steps_and_pulls_at_once_and_settles_them(worker: WorkerHandle) -> None:
    assert worker.pid != os.getpid()
    os.kill(worker.pid, signal.SIGSTOP)
    handle = worker.executor.forward(prefill(0, BLOCKS))
    worker.executor.sample(handle)
    address = worker.transfer.address
    pull = worker.transfer.pull(PULL)
    step, wait = asyncio.ensure_future(worker.executor.collect(handle)), asyncio.ensure_future(pull.wait())
    connecting = asyncio.ensure_future(worker.transfer.connect(address))
    await asyncio.sleep(0.05)
    assert [task.done() for task in (step, wait, connecting)] == [False] * 3
    os.kill(worker.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            await step
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            await wait
        with pytest.raises(EngineDied, match="killed by SIGKILL"):
            await connecting
        await pull.settled()


async def test_a_dead_worker_refuses_everything_with_its_cause(worker: WorkerHandle) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="killed by SIGKILL"):
        await worker.transfer_stats()
    with pytest.raises(EngineDied):
        worker.executor.forward(prefill(0, BLOCKS))
    late = worker.transfer.pull(
        PullSpec(
            peer="p",
            epoch=1,
            source_blocks=(1,),
            target_blocks=(2,),
            digest=bytes(16),
            seed=0,
            deadline=1,
            start_within=1,
        )
    )
    with pytest.raises(EngineDied):
        await late.wait()
    await late.settled()
    late.cancel()
    await worker.transfer.disconnect("p")
    with pytest.raises(EngineDied):
        await worker.transfer.digest((1,), 16, 0)
    await asyncio.wait_for(worker.close(), CLOSE_DEADLINE / 2)


async def test_a_frozen_worker_is_killed_when_it_is_closed(
    worker: WorkerHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.worker.link.CLOSE_DEADLINE", 0.2)
    os.kill(worker.pid, signal.SIGSTOP)
    await asyncio.wait_for(worker.close(), 10)
    assert is_gone(worker.pid, 5)


async def test_a_frozen_worker_is_killed_and_its_step_fails_long_before_the_step_s_deadline(spec: WorkerSpec) -> None:
    worker = await open_worker(spec, "process", QUICK)
    try:
        await asyncio.sleep(2 * QUICK.fence)
        handle = worker.executor.forward(prefill(0, BLOCKS))
        worker.executor.sample(handle)
        await worker.executor.collect(handle)
        os.kill(worker.pid, signal.SIGSTOP)
        handle = worker.executor.forward(prefill(1, BLOCKS))
        worker.executor.sample(handle)
        with pytest.raises(EngineDied, match=f"answered nothing for {QUICK.fence:g} s and was killed by SIGKILL"):
            await asyncio.wait_for(worker.executor.collect(handle), 20)
        assert "answered nothing" in str(await asyncio.wait_for(worker.death(), 5))
        assert is_gone(worker.pid, 5)
    finally:
        await worker.close()


async def test_a_worker_is_not_blamed_for_a_stop_of_its_engine(spec: WorkerSpec) -> None:
    worker = await open_worker(spec, "process", QUICK)
    try:
        time.sleep(2 * QUICK.fence)  # noqa: ASYNC251  as if this process had been stopped
        await asyncio.sleep(QUICK.heartbeat)
        assert (await worker.transfer_stats()).pulls == 0
    finally:
        await worker.close()


async def test_ctrl_c_in_the_terminal_leaves_the_worker_to_its_engine(worker: WorkerHandle) -> None:
    os.kill(worker.pid, signal.SIGINT)
    assert (await worker.transfer_stats()).pulls == 0


async def test_a_worker_that_is_not_ready_in_time_is_ended(spec: WorkerSpec) -> None:
    with pytest.raises(EngineDied, match=r"did not answer within 0\.05 s"):
        await open_worker(spec, "process", replace(Times(), start_timeout=0.05))


PARENT = """
import asyncio, sys, time
from pathlib import Path
from pdserve.worker.service import WorkerSpec, open_worker

async def main():
    spec = WorkerSpec(model=Path(sys.argv[1]), engine_id="p", epoch=1, num_blocks=8, backends=())
    worker = await open_worker(spec, "process")
    print(worker.pid, "torch" in sys.modules, flush=True)
    time.sleep(60)

asyncio.run(main())
"""


def test_the_engine_process_stays_free_of_torch_and_its_death_ends_the_worker(spec: WorkerSpec) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(spec.model)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as parent:
        assert parent.stdout is not None
        pid, has_torch = parent.stdout.readline().split()
        assert has_torch == "False"
        parent.kill()
        assert is_gone(int(pid), 5), "the worker outlived its engine"


def fail_transfers(worker: LocalWorker) -> None:
    """A defect in the thread of its backend."""

    def broken(_: str) -> None:
        raise KeyError("a defect")

    none = np.zeros(0, dtype=np.uint64)
    plan = ReadPlan(local=none, remote=none, lengths=none)
    (pump,) = worker.transfer._pumps
    pump.post(Flight("nobody", plan, broken, may_start=lambda: False))


async def test_a_backend_that_fails_is_the_end_of_a_worker_in_this_process(spec: WorkerSpec) -> None:
    worker = await LocalWorker.open(spec)
    death = asyncio.ensure_future(worker.death())
    await asyncio.sleep(0)
    assert not death.done()
    fail_transfers(worker)
    assert "shared_memory transfer backend failed" in str(await asyncio.wait_for(death, 20))
    await worker.close()


async def test_a_backend_that_fails_is_the_end_of_a_worker_process(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process runs, here: it does not go on serving an engine that would wait for it."""
    opened: list[LocalWorker] = []
    real = LocalWorker.open

    async def open_and_note(spec: WorkerSpec) -> LocalWorker:
        opened.append(await real(spec))
        return opened[0]

    monkeypatch.setattr(LocalWorker, "open", open_and_note)
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(remote_main.serve(theirs.detach()))
    reader, writer = await asyncio.open_connection(sock=ours)
    write_frame(writer, Start(1, spec))
    assert await asyncio.wait_for(read_frame(reader), 60)
    fail_transfers(opened[0])
    with pytest.raises(EngineDied, match="shared_memory transfer backend failed"):
        await asyncio.wait_for(serving, 20)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await writer.wait_closed()
