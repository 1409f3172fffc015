"""Two backends between two workers: which one is used, and what happens to a pull whose backend lets it down."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pdserve.core.errors import TransferFailed, TransferTimeout
from pdserve.core.protocols import PullSpec
from pdserve.transfer.base import ReadPlan, Transfer, TransferBackend
from pdserve.transfer.loopback import LoopbackBackend, LoopbackFabric
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.probe import PROBE_AREA_BYTES
from pdserve.transfer.service import LocalTransferService
from pdserve.transfer.speed import LARGE_BYTES
from tests.kv_layouts import kv_layout
from tests.transfer_faults import FaultyBackend

SOON = 5.0
LAYOUT = kv_layout()


class Named(LoopbackBackend):
    """Loopback under another name, on a fabric of its own; its reads of probes can be made slow or wrong."""

    def __init__(self, name: str, fabric: LoopbackFabric) -> None:
        super().__init__(fabric)
        self.name = name


class Cancellable(FaultyBackend):
    """A held read ends as soon as it is cancelled, as one does that comes through a buffer."""

    def post(self, peer_id: str, plan: ReadPlan) -> Transfer:
        read = super().post(peer_id, plan)

        def cancel() -> None:
            self.refusal = "cancelled"

        read.cancel = cancel  # type: ignore[method-assign]
        return read


@dataclass
class Pair:
    target: LocalTransferService
    source_memory: HostMemory
    target_memory: HostMemory
    first: FaultyBackend
    second: FaultyBackend
    spec: PullSpec

    @property
    def arrived(self) -> bool:
        size = LAYOUT.block_bytes
        return bool((self.target_memory.array[5 * size : 6 * size] == self.source_memory.array[size : 2 * size]).all())


async def opened(
    stack: AsyncExitStack, name: str, epoch: int, backends: tuple[TransferBackend, ...], room: int
) -> tuple[LocalTransferService, HostMemory]:
    memory = HostMemory(LAYOUT.total_bytes + room)
    memory.array[:] = np.random.default_rng(epoch).integers(0, 256, memory.nbytes, dtype=np.uint8)
    service = await LocalTransferService.open(
        engine_id=name, epoch=epoch, layout=LAYOUT, memory=memory, backends=backends
    )
    stack.push_async_callback(service.close)
    return service, memory


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def pair(stack: AsyncExitStack, first: type[FaultyBackend] = FaultyBackend, room: int = 0) -> Pair:
    fabrics: tuple[LoopbackFabric, LoopbackFabric] = {}, {}
    ours = first(Named("one", fabrics[0])), FaultyBackend(Named("two", fabrics[1]))
    source, source_memory = await opened(stack, "p", 1, (Named("one", fabrics[0]), Named("two", fabrics[1])), room)
    target, target_memory = await opened(stack, "d", 2, ours, room)
    await target.connect(source.address)
    digest = await source.digest((1,), 4, seed=9)
    spec = PullSpec(
        peer="p",
        epoch=1,
        source_blocks=(1,),
        target_blocks=(5,),
        digest=digest,
        seed=9,
        deadline=SOON,
        start_within=SOON,
    )
    made = Pair(target, source_memory, target_memory, *ours, spec)

    def let_go() -> None:
        made.first.held = made.second.held = False

    stack.callback(let_go)
    return made


async def test_a_read_that_fails_goes_on_over_the_next_backend_unnoticed(stack: AsyncExitStack) -> None:
    both = await pair(stack)
    both.first.held, both.first.refusal = True, "connection reset"
    receipt = await both.target.pull(both.spec).wait()
    assert both.arrived
    assert (receipt.backend, receipt.failovers) == ("two", (("one", "transfer_failed"),))
    assert both.target.stats().given_up == ((("one", "transfer_failed"), 1),)
    assert both.target.stats().errors_by_code == ()


async def test_a_broken_backend_comes_last_until_it_is_tried_again(stack: AsyncExitStack) -> None:
    both = await pair(stack)
    both.first.held, both.first.refusal = True, "connection reset"
    await both.target.pull(both.spec).wait()
    posted = both.first.posted
    receipt = await both.target.pull(both.spec).wait()
    assert (receipt.backend, receipt.failovers, both.first.posted) == ("two", (), posted)
    both.first.held, both.first.refusal = False, ""
    both.second.held, both.second.refusal = True, "and this one too"
    receipt = await both.target.pull(both.spec).wait()
    assert (receipt.backend, len(both.first.connected)) == ("one", 2), "a broken lane is connected before it is used"


async def test_a_broken_lane_with_a_read_under_way_is_not_waited_for_where_there_is_another(
    stack: AsyncExitStack,
) -> None:
    both = await pair(stack)
    both.first.held, both.first.refused = True, {2}
    both.second.held, both.second.refused = True, {1}
    goes_on = both.target.pull(replace(both.spec, deadline=10 * SOON))
    with pytest.raises(TransferFailed, match="over two failed"):
        await both.target.pull(replace(both.spec, target_blocks=(6,))).wait()
    both.second.held = False
    receipt = await both.target.pull(replace(both.spec, target_blocks=(7,))).wait()
    assert (receipt.backend, receipt.failovers) == ("two", (("one", "transfer_failed"),))
    both.first.held = False
    assert (await goes_on.wait()).backend == "one"


async def test_when_no_backend_delivers_the_last_ones_error_is_told(stack: AsyncExitStack) -> None:
    both = await pair(stack)
    both.first.held, both.first.refusal = True, "connection reset"
    both.second.held, both.second.refusal = True, "out of order"
    pull = both.target.pull(both.spec)
    with pytest.raises(TransferFailed, match="over two failed: out of order"):
        await pull.wait()
    await asyncio.wait_for(pull.settled(), SOON)


async def test_a_stalled_read_that_can_be_broken_off_goes_on_over_the_next_backend(stack: AsyncExitStack) -> None:
    both = await pair(stack, Cancellable)
    both.first.held = True
    receipt = await both.target.pull(replace(both.spec, deadline=1.0)).wait()
    assert both.arrived
    assert (receipt.backend, receipt.failovers) == ("two", (("one", "transfer_failed"),))


async def test_blocks_a_stalled_read_may_still_write_are_not_read_into_by_another_one(stack: AsyncExitStack) -> None:
    both = await pair(stack)
    both.first.held = True
    pull = both.target.pull(replace(both.spec, deadline=0.2))
    with pytest.raises(TransferTimeout):
        await pull.wait()
    settled = asyncio.ensure_future(pull.settled())
    await asyncio.sleep(0.05)
    assert not settled.done()
    assert (both.second.posted, both.arrived) == (0, False)
    both.first.held = False
    await asyncio.wait_for(settled, SOON)
    assert both.second.posted == 0


async def test_a_stalled_read_that_ends_late_still_counts(stack: AsyncExitStack) -> None:
    both = await pair(stack)
    both.first.held = True
    pull = both.target.pull(replace(both.spec, deadline=SOON))
    asyncio.get_running_loop().call_later(0.1, setattr, both.first, "held", False)
    assert (await pull.wait()).backend == "one"


async def test_the_backend_that_damages_probes_is_not_used(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    fabrics: tuple[LoopbackFabric, LoopbackFabric] = {}, {}
    source, _ = await opened(stack, "p", 1, (Named("one", fabrics[0]), Named("two", fabrics[1])), PROBE_AREA_BYTES)
    damaging = FaultyBackend(Named("one", fabrics[0]))
    damaging.damages = 1000
    target, memory = await opened(stack, "d", 2, (damaging, Named("two", fabrics[1])), PROBE_AREA_BYTES)
    before = memory.array[: LAYOUT.total_bytes].copy()
    assert await target.connect(source.address) == "two"
    assert "other bytes" in caplog.text
    np.testing.assert_array_equal(memory.array[: LAYOUT.total_bytes], before)
    assert memory.nbytes - LAYOUT.total_bytes == 2 * LARGE_BYTES


async def test_a_backend_that_does_not_answer_a_probe_is_not_used_and_the_others_are_not_measured_into_its_landing(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.transfer.probe.PROBE_DEADLINE", 0.1)
    fabrics: tuple[LoopbackFabric, LoopbackFabric] = {}, {}
    source, _ = await opened(stack, "p", 1, (Named("one", fabrics[0]), Named("two", fabrics[1])), PROBE_AREA_BYTES)
    silent, second = FaultyBackend(Named("one", fabrics[0])), FaultyBackend(Named("two", fabrics[1]))
    silent.held = True
    target, _ = await opened(stack, "d", 2, (silent, second), PROBE_AREA_BYTES)
    assert await target.connect(source.address) == "two"
    assert (silent.posted, second.posted) == (1, 0)
    silent.held = False
