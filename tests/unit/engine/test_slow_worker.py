"""Blocks a worker process has yet to write into stay taken, however late it is and whoever has given up on it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from pdserve.config.times import Times
from pdserve.core.layout import KVGroup, KVLayout
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.core.shards import sole_shard
from pdserve.core.ticket import HandoffNews
from pdserve.engine.handoff_source import HandoffSource
from pdserve.engine.pair_checker import PairChecker
from pdserve.worker.frames import Digest, Fill
from pdserve.worker.remote import RemoteExecutor
from pdserve.worker.remote_transfer import RemoteTransfer
from tests.clocks import ManualClock, settle
from tests.scripted_worker import ScriptedWorker, scripted_worker
from tests.unit.engine.engines import ENDPOINT, make_engine

LAYOUT = KVLayout(group=KVGroup(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32"), block_size=4, num_blocks=64)
ADDRESS = PeerAddress(
    engine_id=ENDPOINT.engine_id,
    epoch=ENDPOINT.epoch,
    layout_hash=LAYOUT.wire_hash,
    ranks=(RankAddress(shard=sole_shard(LAYOUT), backends=()),),
)


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedWorker]:
    """Too late for every deadline there is, but alive."""
    monkeypatch.setattr("pdserve.worker.remote_transfer.CALL_DEADLINE", 0.0)
    async with scripted_worker() as worker:
        worker.link.watch(Times())
        yield worker


def end(worker: ScriptedWorker, number: int, value: bytes | None, *, by_death: bool) -> None:
    if by_death:
        worker.hang_up()
        worker.process.kill()
    else:
        worker.answer(number, value)


@pytest.mark.parametrize("by_death", [False, True])
async def test_a_released_ticket_s_blocks_are_not_given_back_before_the_worker_has_digested_them(
    worker: ScriptedWorker, by_death: bool
) -> None:
    given_back, news = asyncio.Event(), list[HandoffNews]()
    source = HandoffSource(
        endpoint=ENDPOINT,
        transfer=RemoteTransfer(worker.link, LAYOUT, ADDRESS),
        times=Times(),
        clock=ManualClock(),
        on_end=lambda *_: given_back.set(),
        on_caught_up=lambda _: None,
    )
    source.issue("t", 5, "r", 6, (10, 11))
    source.attach("t", 0, news.append)
    source.computed(5, 6)
    digest = await worker.commands.get()
    assert isinstance(digest, Digest)
    await settle()
    source.release("t")
    assert (given_back.is_set(), news) == (False, [])
    end(worker, digest.reply, bytes(16), by_death=by_death)
    await asyncio.wait_for(given_back.wait(), 20)


@pytest.mark.parametrize("by_death", [False, True])
async def test_blocks_of_a_pattern_nobody_waits_for_are_not_given_back_before_the_worker_has_filled_them(
    worker: ScriptedWorker, by_death: bool
) -> None:
    transfer = RemoteTransfer(worker.link, LAYOUT, ADDRESS)
    engine = make_engine(RemoteExecutor(worker.link), transfer, ManualClock())
    checker = PairChecker(engine, transfer, Times())
    offering = asyncio.create_task(checker.pattern(ENDPOINT.epoch, 8, 1, ()).__aenter__())
    fill = await worker.commands.get()
    assert isinstance(fill, Fill)
    await settle()
    assert not offering.done()
    offering.cancel()  # as gRPC does once the call is too old
    with pytest.raises(asyncio.CancelledError):
        await offering
    assert engine.snapshot().blocks.quarantined == len(fill.blocks)
    end(worker, fill.reply, None, by_death=by_death)
    async with asyncio.timeout(20):
        while engine.snapshot().blocks.free < LAYOUT.num_blocks:
            await asyncio.sleep(0)
    await checker.close()
