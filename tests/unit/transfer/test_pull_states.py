"""A pull's life: what wait() and settled() answer, and when target blocks may still be written."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pdserve.core.errors import DigestMismatch, LeaseExpired, StaleEpoch, TransferFailed, TransferTimeout
from pdserve.core.protocols import Pull, PullSpec
from pdserve.transfer.digest import DigestKind
from pdserve.transfer.lanes import Lane
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.clocks import ManualClock, settle
from tests.kv_layouts import kv_layout
from tests.transfer_faults import FaultyBackend

SOON = 2.0
"""Seconds after which something that should have happened at once counts as not happening."""


@dataclass
class Pair:
    source: LocalTransferService
    source_memory: HostMemory
    target: LocalTransferService
    target_memory: HostMemory
    backend: FaultyBackend
    spec: PullSpec

    @property
    def arrived(self) -> bool:
        size = self.target.layout.block_bytes
        return bool((self.target_memory.array[5 * size : 7 * size] == self.source_memory.array[size : 3 * size]).all())


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    layout, backend = kv_layout(), FaultyBackend(LoopbackBackend())
    memories = HostMemory(layout.total_bytes), HostMemory(layout.total_bytes)
    memories[0].array[:] = np.random.default_rng(0).integers(1, 256, layout.total_bytes, dtype=np.uint8)
    source = await LocalTransferService.open(
        engine_id="p", epoch=11, layout=layout, memory=memories[0], backends=(LoopbackBackend(),)
    )
    target = await LocalTransferService.open(
        engine_id="d", epoch=22, layout=layout, memory=memories[1], backends=(backend,)
    )
    digest = await source.digest((1, 2), 8, seed=99)
    await target.connect(source.address)
    spec = PullSpec(
        peer="p",
        epoch=11,
        source_blocks=(1, 2),
        target_blocks=(5, 6),
        digest=digest,
        seed=99,
        deadline=SOON,
        start_within=SOON,
    )
    yield Pair(source, memories[0], target, memories[1], backend, spec)
    backend.held = False
    await target.close()
    await source.close()


async def still_unsettled(settled: "asyncio.Future[None]") -> bool:
    done, _ = await asyncio.wait({settled}, timeout=0.05)
    return not done


async def another_source(pair: Pair, engine_id: str, epoch: int) -> LocalTransferService:
    """Laid out as the pair's; whoever asks for it closes it."""
    return await LocalTransferService.open(
        engine_id=engine_id,
        epoch=epoch,
        layout=pair.source.layout,
        memory=HostMemory(pair.source_memory.nbytes),
        backends=(LoopbackBackend(),),
    )


async def test_a_pull_delivers_the_bytes_and_a_receipt(pair: Pair) -> None:
    pull = pair.target.pull(pair.spec)
    receipt = await pull.wait()
    await asyncio.wait_for(pull.settled(), SOON)
    assert pair.arrived
    assert (receipt.backend, receipt.num_bytes) == ("loopback", 2 * pair.target.layout.block_bytes)
    stats = pair.target.stats()
    assert (stats.pulls, stats.unsettled, stats.bytes_by_backend) == (1, 0, (("loopback", receipt.num_bytes),))
    assert await pull.wait() == receipt


async def test_after_the_deadline_the_target_stays_quarantined_until_the_late_bytes_have_landed(pair: Pair) -> None:
    pair.backend.held = True
    pull = pair.target.pull(replace(pair.spec, deadline=0.05))
    with pytest.raises(TransferTimeout, match=r"within 0\.05 s"):
        await pull.wait()
    settled = asyncio.ensure_future(pull.settled())
    assert await still_unsettled(settled)
    assert pair.target.stats().unsettled == 1
    assert not pair.arrived
    pair.backend.held = False
    await asyncio.wait_for(settled, SOON)
    assert pair.arrived, "the read was over, so its bytes must be there and nothing can come later"
    assert pair.target.stats().unsettled == 0
    assert pair.target.stats().errors_by_code == (("transfer_timeout", 1),)


async def test_a_cancelled_pull_fails_at_once_and_settles_when_the_backend_reports_an_error(pair: Pair) -> None:
    pair.backend.held = True
    pull = pair.target.pull(pair.spec)
    await asyncio.sleep(0.02)
    pull.cancel()
    with pytest.raises(TransferFailed, match="cancelled"):
        await asyncio.wait_for(pull.wait(), SOON)
    settled = asyncio.ensure_future(pull.settled())
    assert await still_unsettled(settled)
    pair.backend.refusal = "the peer was fenced"
    await asyncio.wait_for(settled, SOON)
    assert not pair.arrived


async def test_a_pull_cancelled_before_its_read_started_never_reads(pair: Pair) -> None:
    pair.backend.free.clear()
    before = pair.target.pull(replace(pair.spec, target_blocks=(3, 4)))
    pull = pair.target.pull(pair.spec)
    pull.cancel()
    with pytest.raises(TransferFailed, match="cancelled"):
        await pull.wait()
    pair.backend.free.set()
    await asyncio.wait_for(pull.settled(), SOON)
    await before.wait()
    assert not pair.arrived
    assert pair.backend.posted == 1


async def test_cancelling_after_the_answer_changes_nothing(pair: Pair) -> None:
    pull = pair.target.pull(pair.spec)
    receipt = await pull.wait()
    pull.cancel()
    assert await pull.wait() == receipt


async def test_an_error_of_the_backend_fails_and_settles_the_pull(pair: Pair) -> None:
    pair.backend.held, pair.backend.refusal = True, "connection reset"
    pull = pair.target.pull(pair.spec)
    with pytest.raises(TransferFailed, match="connection reset"):
        await pull.wait()
    await asyncio.wait_for(pull.settled(), SOON)
    assert pair.target.stats().errors_by_code == (("transfer_failed", 1),)


async def test_damage_on_the_way_is_healed_by_one_more_read(pair: Pair) -> None:
    pair.backend.damages = 1
    await pair.target.pull(pair.spec).wait()
    assert pair.arrived
    assert (pair.backend.posted, pair.target.stats().rereads) == (2, 1)


async def test_after_the_lease_damage_is_not_read_again(pair: Pair) -> None:
    clock = pair.target._clock = ManualClock()
    pair.backend.damages, pair.backend.held = 1, True
    pull = pair.target.pull(replace(pair.spec, start_within=1.0))
    while not pair.backend.posted:
        await asyncio.sleep(0.01)
    await clock.advance(1.0)
    pair.backend.held = False
    with pytest.raises(LeaseExpired):
        await pull.wait()
    await asyncio.wait_for(pull.settled(), SOON)
    assert pair.backend.posted == 1


async def test_without_time_left_nothing_is_read(pair: Pair) -> None:
    with pytest.raises(LeaseExpired):
        await pair.target.pull(replace(pair.spec, start_within=0.0)).wait()
    assert pair.backend.posted == 0


async def test_a_read_whose_turn_comes_after_the_lease_is_not_started(pair: Pair) -> None:
    clock, busy = ManualClock(), threading.Event()
    pair.target._clock = clock
    (pump,) = pair.target._pumps
    pump.call(lambda _: busy.wait(SOON))
    pull = pair.target.pull(replace(pair.spec, start_within=1.0))
    await settle()
    await clock.advance(1.0)
    busy.set()
    with pytest.raises(LeaseExpired):
        await asyncio.wait_for(pull.wait(), SOON)
    await asyncio.wait_for(pull.settled(), SOON)
    assert pair.backend.posted == 0


async def test_damage_in_both_reads_is_a_digest_mismatch(pair: Pair) -> None:
    pair.backend.damages = 2
    pull = pair.target.pull(pair.spec)
    with pytest.raises(DigestMismatch):
        await pull.wait()
    await asyncio.wait_for(pull.settled(), SOON)
    assert (pair.backend.posted, pair.backend.damages) == (2, 0)


async def test_disconnecting_fails_what_waits_and_keeps_the_backend_connected_until_it_settles(pair: Pair) -> None:
    pair.backend.held = True
    pull = pair.target.pull(pair.spec)
    await asyncio.sleep(0.02)
    await pair.target.disconnect("p")
    with pytest.raises(TransferFailed, match="disconnected"):
        await asyncio.wait_for(pull.wait(), SOON)
    settled = asyncio.ensure_future(pull.settled())
    assert await still_unsettled(settled)
    assert pair.backend.disconnected == []
    with pytest.raises(TransferFailed, match="have not ended"):
        await pair.target.connect(pair.source.address)
    pair.backend.held = False
    await asyncio.wait_for(settled, SOON)
    await pair.target.connect(pair.source.address)
    assert pair.backend.connected == 2 * ["p/000000000000000b/0"]
    await pair.target.pull(pair.spec).wait()


async def test_a_pull_from_another_incarnation_or_a_stranger_is_refused(pair: Pair) -> None:
    with pytest.raises(StaleEpoch):
        await pair.target.pull(replace(pair.spec, epoch=12)).wait()
    refused = pair.target.pull(replace(pair.spec, peer="q"))
    with pytest.raises(TransferFailed, match="not connected to q"):
        await refused.wait()
    await refused.settled()
    refused.cancel()
    with pytest.raises(TransferFailed, match="only 16 blocks"):
        await pair.target.pull(replace(pair.spec, source_blocks=(1, 16))).wait()
    assert pair.backend.posted == 0
    with pytest.raises(ValueError, match="block ids"):
        pair.target.pull(replace(pair.spec, target_blocks=(5, 16)))


async def test_connecting_the_same_incarnation_again_does_nothing_unless_a_read_of_it_failed(pair: Pair) -> None:
    assert await pair.target.connect(pair.source.address) == "loopback"
    assert len(pair.backend.connected) == 1
    pair.backend.held, pair.backend.refusal = True, "connection reset"
    with pytest.raises(TransferFailed):
        await pair.target.pull(pair.spec).wait()
    pair.backend.held, pair.backend.refusal = False, ""
    assert await pair.target.connect(pair.source.address) == "loopback"
    assert len(pair.backend.connected) == 2
    await pair.target.pull(pair.spec).wait()


async def one_fails_while_one_goes_on(pair: Pair) -> Pull:
    """The only lane is broken; the pull that goes on has its read in flight."""
    pair.backend.held, pair.backend.refused = True, {2}
    goes_on = pair.target.pull(pair.spec)
    with pytest.raises(TransferFailed, match="refused"):
        await pair.target.pull(replace(pair.spec, target_blocks=(3, 4))).wait()
    return goes_on


async def test_connecting_after_a_failed_read_waits_for_others_that_go_on(pair: Pair) -> None:
    goes_on = await one_fails_while_one_goes_on(pair)
    connecting = asyncio.ensure_future(pair.target.connect(pair.source.address))
    await settle()
    assert not connecting.done()
    pair.backend.held = False
    await goes_on.wait()
    assert pair.arrived
    assert await asyncio.wait_for(connecting, SOON) == "loopback"
    assert (len(pair.backend.connected), pair.backend.disconnected) == (2, [])
    await pair.target.pull(pair.spec).wait()


async def test_a_pull_after_a_failed_read_waits_for_others_that_go_on(pair: Pair) -> None:
    goes_on = await one_fails_while_one_goes_on(pair)
    later = pair.target.pull(replace(pair.spec, target_blocks=(7, 8)))
    await settle()
    assert pair.backend.posted == 2
    pair.backend.held = False
    await asyncio.gather(goes_on.wait(), later.wait())


async def test_a_read_in_quarantine_is_not_waited_for_and_no_lane_is_connected_under_it(pair: Pair) -> None:
    clock = pair.target._clock = ManualClock()
    goes_on = await one_fails_while_one_goes_on(pair)
    connecting = asyncio.ensure_future(pair.target.connect(pair.source.address))
    await settle()
    assert not connecting.done()
    await clock.advance(SOON)
    with pytest.raises(TransferTimeout):
        await goes_on.wait()
    with pytest.raises(TransferFailed, match="have not ended"):
        await asyncio.wait_for(connecting, SOON)
    assert (len(pair.backend.connected), pair.target.stats().unsettled) == (1, 1)
    pair.backend.held = False
    await asyncio.wait_for(goes_on.settled(), SOON)
    await pair.target.pull(replace(pair.spec, target_blocks=(7, 8))).wait()


async def test_who_gives_up_connecting_again_leaves_the_peer_to_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.backend.held, pair.backend.refused = True, {1}
    with pytest.raises(TransferFailed, match="refused"):
        await pair.target.pull(pair.spec).wait()
    pair.backend.held = False
    begun = threading.Event()

    def connect(*_: object) -> "Future[None]":
        begun.set()
        return Future()

    with monkeypatch.context() as patched:
        patched.setattr(pair.backend, "connect", connect)
        connecting = asyncio.ensure_future(pair.target.connect(pair.source.address))
        assert await asyncio.to_thread(begun.wait, SOON)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
    await pair.target.pull(pair.spec).wait()
    assert pair.arrived


async def test_a_successor_that_cannot_be_read_ends_no_read_of_its_predecessor(pair: Pair) -> None:
    successor = await another_source(pair, "p", 12)
    pair.backend.held = True
    pull = pair.target.pull(pair.spec)
    address = successor.address
    await successor.close()
    with pytest.raises(TransferFailed, match="not in this process"):
        await pair.target.connect(address)
    pair.backend.held = False
    await pull.wait()
    assert pair.arrived


async def test_a_read_under_way_goes_on_when_its_lane_breaks_before_the_pull_looks(pair: Pair) -> None:
    pair.backend.held = True
    pull = pair.target.pull(pair.spec)
    (lane,) = pair.target._peers["p", 0].lanes
    lane.broken_at = pair.target._clock.monotonic()
    await settle()
    pair.backend.held = False
    await pull.wait()
    assert (pair.backend.posted, len(pair.backend.connected)) == (1, 1)


async def test_a_deadline_also_covers_the_wait_behind_other_reads_in_flight(pair: Pair) -> None:
    pair.backend.held = True
    pulls = [
        pair.target.pull(replace(pair.spec, target_blocks=(2 * i, 2 * i + 1), deadline=0.05 * (i + 1)))
        for i in range(4)
    ]
    for pull in pulls:
        with pytest.raises(TransferTimeout):
            await asyncio.wait_for(pull.wait(), SOON)
    assert pair.target.stats().unsettled == 4
    pair.backend.held = False
    await asyncio.wait_for(asyncio.gather(*(pull.settled() for pull in pulls)), SOON)


async def test_closing_is_bounded_and_the_backend_outlives_reads_that_have_not_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.transfer.service.CLOSE_DEADLINE", 0.1)
    pair.backend.held = True
    pull = pair.target.pull(pair.spec)
    await asyncio.sleep(0.02)
    await asyncio.wait_for(pair.target.close(), SOON)
    with pytest.raises(TransferFailed, match="closed"):
        await pull.wait()
    assert not pair.backend.closed
    pair.backend.held = False
    await asyncio.wait_for(pull.settled(), SOON)
    with pytest.raises(TransferFailed, match="not connected"):
        await pair.target.pull(pair.spec).wait()


async def test_a_source_that_digests_otherwise_is_verified_with_its_function(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a source does whose KV lies on a GPU, read by a target whose KV does not."""
    with monkeypatch.context() as patch:
        patch.setattr("pdserve.transfer.service.digest_kind", lambda *_: DigestKind.KEYED_SUM)
        other = await another_source(pair, "q", 33)
    try:
        await pair.target.connect(other.address)
        digest = await other.digest((1, 2), 8, seed=99)
        spec = replace(pair.spec, peer="q", epoch=33, digest=digest)
        await pair.target.pull(spec).wait()
        with pytest.raises(DigestMismatch):
            await pair.target.pull(replace(spec, digest=await pair.source.digest((1, 2), 8, seed=99))).wait()
    finally:
        await other.close()


async def test_a_pull_that_was_stopped_while_its_lane_was_mended_never_reads(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the mending ends, and even if it swallows the cancellation."""
    pair.backend.held, pair.backend.refusal = True, "the peer was gone"
    with pytest.raises(TransferFailed, match="was gone"):
        await pair.target.pull(pair.spec).wait()
    pair.backend.held, pair.backend.refusal = False, ""
    begun, mended = asyncio.Event(), asyncio.Event()

    async def mend(self: Lane, *, patient: bool) -> None:
        begun.set()
        while not mended.is_set():
            with suppress(asyncio.CancelledError):
                await mended.wait()

    monkeypatch.setattr(Lane, "mend", mend)
    posted = pair.backend.posted
    pull = pair.target.pull(pair.spec)
    await begun.wait()
    pull.cancel()
    await asyncio.wait_for(pull.settled(), SOON)
    mended.set()
    await asyncio.sleep(0.05)
    assert pair.backend.posted == posted


async def test_a_pull_whose_bytes_cannot_be_digested_fails_and_settles(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pdserve.transfer.service.region_digest", broken)
    pair.backend.digests = False
    pull = pair.target.pull(pair.spec)
    with pytest.raises(TransferFailed, match="could not be digested: RuntimeError"):
        await asyncio.wait_for(pull.wait(), SOON)
    await asyncio.wait_for(pull.settled(), SOON)
    assert "could not be digested" in caplog.text


async def test_what_was_digested_while_it_was_copied_is_not_digested_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.transfer.service.region_digest", None)
    await pair.target.pull(pair.spec).wait()
    assert pair.arrived
    with pytest.raises(DigestMismatch):
        await pair.target.pull(replace(pair.spec, digest=bytes(16))).wait()


async def test_a_read_that_ends_after_the_service_was_closed_settles_its_pull(pair: Pair) -> None:
    """There is no thread any more that would digest what it brought."""
    pair.backend.held, pair.backend.digests = True, False
    pull = pair.target.pull(pair.spec)
    await asyncio.sleep(0.02)
    pair.target._digests.shutdown()
    pair.backend.held = False
    with pytest.raises(TransferFailed, match="closed"):
        await asyncio.wait_for(pull.wait(), SOON)
    await asyncio.wait_for(pull.settled(), SOON)
