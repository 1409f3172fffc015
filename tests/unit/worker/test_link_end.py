"""Between a worker's last word and the news of how it ended, nothing that is said to it is anybody else's fault."""

import asyncio
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from pdserve.core.batch import Batch
from pdserve.core.errors import EngineDied
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.core.shards import sole_shard
from pdserve.worker.frames import Ping
from pdserve.worker.remote import RemoteExecutor
from pdserve.worker.remote_transfer import RemoteTransfer
from tests.clocks import settle
from tests.pulls import PULL
from tests.scripted_worker import ScriptedWorker, scripted_worker

LAYOUT = KVLayout(group=KVGroup(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32"), block_size=4, num_blocks=8)
ADDRESS = PeerAddress(
    engine_id="d0",
    epoch=1,
    layout_hash=LAYOUT.wire_hash,
    ranks=(RankAddress(shard=sole_shard(LAYOUT), backends=()),),
)


async def linger(worker: ScriptedWorker) -> None:
    """The worker has closed its socket, and its end is not known yet."""
    worker.hang_up()
    await worker.process.lingers.wait()
    await settle()
    assert worker.link.death is None


async def everything_fails_with_the_end_of_the_worker() -> None:
    async with scripted_worker() as worker:
        transfer, executor = RemoteTransfer(worker.link, LAYOUT, ADDRESS), RemoteExecutor(worker.link)
        before = transfer.pull(PULL)
        await linger(worker)
        before.cancel()
        pull = transfer.pull(PULL)
        step = executor.forward(Batch(step=1, rows=()))
        executor.sample(step)
        waits = [
            asyncio.ensure_future(wait)
            for wait in (
                before.wait(),
                pull.wait(),
                executor.collect(step),
                transfer.connect(ADDRESS),
                transfer.digest((1,), 4, 0),
                worker.link.ask(Ping, type(None)),
            )
        ]
        await settle()
        assert not any(wait.done() for wait in waits)
        worker.process.kill()
        for error in await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 20):
            assert isinstance(error, EngineDied)
            assert "was killed by SIGKILL" in str(error)
        await asyncio.gather(before.settled(), pull.settled())


async def a_link_closes_while_its_worker_ends() -> None:
    async with scripted_worker() as worker:
        await linger(worker)
        closing = asyncio.create_task(worker.link.close())
        await settle()
        assert not closing.done()
        worker.process.kill()
        await asyncio.wait_for(closing, 20)


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("scenario", [everything_fails_with_the_end_of_the_worker, a_link_closes_while_its_worker_ends])
def test_a_worker_that_ends_is_told_nothing_and_whoever_waits_for_it_hears_how_it_ended(
    scenario: Callable[[], Coroutine[None, None, None]], new_event_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(scenario())
