import asyncio
from typing import cast

import pytest

from pdserve.core.batch import Batch, StepOutput
from pdserve.core.errors import EngineDied
from pdserve.worker import gang
from pdserve.worker.gang import GangExecutor
from pdserve.worker.remote import RemoteExecutor

BATCH = Batch(step=1, rows=())


class Rank:
    """An executor whose only step ends as it is told."""

    def __init__(self) -> None:
        self.output: asyncio.Future[StepOutput] = asyncio.get_running_loop().create_future()

    def forward(self, batch: Batch) -> object:
        return self

    def sample(self, handle: object, masks: object = None) -> None:
        pass

    async def collect(self, handle: object) -> StepOutput:
        return await asyncio.shield(self.output)


def step_of(ranks: list[Rank], death: "asyncio.Future[EngineDied]") -> "asyncio.Task[StepOutput]":
    executor = GangExecutor(cast("list[RemoteExecutor]", ranks), death)
    handle = executor.forward(BATCH)
    executor.sample(handle)
    return asyncio.create_task(executor.collect(handle))


async def test_how_a_rank_ended_is_the_reason_even_if_another_rank_is_heard_first() -> None:
    ranks, death = [Rank(), Rank()], asyncio.get_running_loop().create_future()
    step = step_of(ranks, death)
    ranks[0].output.set_exception(EngineDied("rank 0 lost the other ranks"))
    await asyncio.sleep(0.01)
    assert not step.done()
    death.set_result(EngineDied("the worker process 7 was killed"))
    with pytest.raises(EngineDied, match="process 7"):
        await asyncio.wait_for(step, 5)


async def test_a_step_s_own_error_is_told_when_every_rank_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "REASON_DEADLINE", 0.01)
    ranks, death = [Rank(), Rank()], asyncio.get_running_loop().create_future()
    step = step_of(ranks, death)
    ranks[0].output.set_exception(EngineDied("step 1 took longer than 60 s"))
    with pytest.raises(EngineDied, match="took longer"):
        await asyncio.wait_for(step, 5)


async def test_a_gang_that_closes_meanwhile_leaves_the_step_s_own_error() -> None:
    ranks, death = [Rank(), Rank()], asyncio.get_running_loop().create_future()
    step = step_of(ranks, death)
    ranks[1].output.set_exception(EngineDied("rank 1 lost the other ranks"))
    await asyncio.sleep(0.01)
    death.cancel()
    with pytest.raises(EngineDied, match="rank 1"):
        await asyncio.wait_for(step, 5)
