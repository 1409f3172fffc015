"""Blocks divided among ranks are nobody's before every rank has let go of them."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.core.shards import KVShard
from pdserve.worker.frames import Fill, Ping
from pdserve.worker.gang_transfer import GangTransfer
from pdserve.worker.remote_transfer import RemoteTransfer
from tests.clocks import settle
from tests.scripted_worker import ScriptedWorker, scripted_worker

LAYOUT = KVLayout(group=KVGroup(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32"), block_size=4, num_blocks=8)


def rank(number: int, worker: ScriptedWorker) -> RemoteTransfer:
    shard = KVShard(rank=number, layers=(0, 1), heads=(number, number + 1))
    ranks = (RankAddress(shard=shard, backends=()),)
    return RemoteTransfer(
        worker.link, LAYOUT, PeerAddress(engine_id="u0", epoch=7, layout_hash=LAYOUT.wire_hash, ranks=ranks)
    )


async def test_blocks_are_not_filled_before_the_last_rank_has_written_even_if_another_fails() -> None:
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(scripted_worker()) for _ in range(2)]
        gang = GangTransfer([rank(number, worker) for number, worker in enumerate(workers)])
        filling = asyncio.create_task(gang.fill((1, 2), 3))
        failing, slow = [await worker.commands.get() for worker in workers]
        assert isinstance(failing, Fill)
        assert isinstance(slow, Fill)
        workers[0].fail(failing.reply, ValueError("out of range"))
        await asyncio.wait_for(workers[0].link.ask(Ping, type(None)), 20)
        await settle()
        assert not filling.done()
        workers[1].answer(slow.reply, None)
        with pytest.raises(ValueError, match="out of range"):
            await asyncio.wait_for(filling, 20)
