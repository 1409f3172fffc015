"""Every backend between two processes at once: all are measured, one is chosen, and a pull survives losing it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import pytest

from pdserve.transfer.backends import make_backends
from pdserve.transfer.base import TransferBackend
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.probe import PROBE_AREA_BYTES
from pdserve.transfer.service import LocalTransferService
from tests.contract.source_host import Open
from tests.contract.sources import InChild, Source
from tests.contract.transfer_bench import pull, spec_for
from tests.kv_layouts import by_block, kv_layout
from tests.transfer_faults import FaultyBackend

NAMES = ("nixl", "shared_memory", "gloo", "grpc")
LAYOUT = kv_layout(16)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_a_pull_goes_from_backend_to_backend_until_one_delivers(stack: AsyncExitStack) -> None:
    child = InChild({})
    stack.callback(child.end)
    source = await Source.open(child, Open("p", 1, LAYOUT, NAMES, fill=1))
    backends = {backend.name: FaultyBackend(backend) for backend in make_backends(NAMES, "d", 2)}
    memory = HostMemory(LAYOUT.total_bytes + PROBE_AREA_BYTES)
    service = await open_target(stack, memory, tuple(backends.values()))
    chosen = await service.connect(source.address)
    order = []
    for turn in range(len(NAMES)):
        receipt = await pull(service, await spec_for(source, (turn,), (15 - turn,), deadline=30))
        order.append(receipt.backend)
        np.testing.assert_array_equal(by_block(LAYOUT, memory.array)[15 - turn], by_block(LAYOUT, source.bytes)[turn])
        assert [name for name, _ in receipt.failovers] == order[turn - 1 : turn]
        backends[receipt.backend].held, backends[receipt.backend].refusal = True, "cut"
    assert order[0] == chosen
    assert sorted(order) == sorted(NAMES)


async def open_target(
    stack: AsyncExitStack, memory: HostMemory, backends: tuple[TransferBackend, ...]
) -> LocalTransferService:
    service = await LocalTransferService.open(engine_id="d", epoch=2, layout=LAYOUT, memory=memory, backends=backends)
    stack.push_async_callback(service.close)
    return service
