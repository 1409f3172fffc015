"""A peer that freezes while it is read: why target blocks are quarantined, and that it is enough.

NIXL has no cancellation: when the peer resumes, the bytes still come. Over TCP a frozen peer really leaves
the read in progress; over CMA the kernel copies them without it.
"""

import asyncio
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pdserve.core.errors import TransferTimeout
from pdserve.core.protocols import Pull
from pdserve.transfer.memory import HostMemory
from pdserve.transfer.service import LocalTransferService
from tests.contract.sources import InChild
from tests.contract.transfer_bench import Bench, Kind, pull, spec_for
from tests.kv_layouts import GROUP, kv_layout

pytestmark = [
    pytest.mark.parametrize("kind", [Kind("nixl", {"UCX_TLS": "tcp"})], ids=str, indirect=True, scope="module"),
    pytest.mark.timeout(60),
]

LAYOUT = replace(kv_layout(65, group=replace(GROUP, num_layers=8, num_kv_heads=8, head_dim=64)), block_size=32)
"""65 blocks of 1 MiB, far more than the sockets between two processes hold."""

REUSED = 0xA5
"""What the next owner of the blocks writes there."""


@dataclass
class Frozen:
    """A pull whose peer is stopped and whose deadline has passed."""

    peer: InChild
    service: LocalTransferService
    memory: HostMemory
    pull: Pull
    settled: "asyncio.Future[None]"

    def reuse(self) -> None:
        self.memory.array[:] = REUSED

    async def overwritten(self) -> int:
        """Bytes that somebody wrote over the next owner's, looked for until well after the last could come."""
        await asyncio.sleep(0.5)
        return int(np.count_nonzero(self.memory.array != REUSED))


async def frozen_pull(bench: Bench) -> Frozen:
    source, peer = await bench.doomed_source(LAYOUT)
    service, memory = await bench.target(LAYOUT)
    await service.connect(source.address)
    await pull(service, await spec_for(source, (64,), (64,)))
    blocks = tuple(range(64))
    spec = await spec_for(source, blocks, blocks, deadline=0.5)
    peer.signal(signal.SIGSTOP)
    running = service.pull(spec)
    with pytest.raises(TransferTimeout):
        await running.wait()
    settled = asyncio.ensure_future(running.settled())
    await asyncio.sleep(0.2)
    assert not settled.done(), "the read must still be in progress when its deadline has passed"
    assert service.stats().unsettled == 1
    return Frozen(peer, service, memory, running, settled)


async def test_without_quarantine_a_resumed_peer_overwrites_the_next_owners_bytes(bench: Bench) -> None:
    frozen = await frozen_pull(bench)
    frozen.reuse()
    frozen.peer.signal(signal.SIGCONT)
    await asyncio.wait_for(frozen.settled, 20)
    assert await frozen.overwritten() > 1 << 20


async def test_with_quarantine_no_byte_of_the_next_owner_changes(bench: Bench) -> None:
    frozen = await frozen_pull(bench)
    frozen.peer.signal(signal.SIGCONT)
    await asyncio.wait_for(frozen.settled, 20)
    frozen.reuse()
    assert await frozen.overwritten() == 0
    assert frozen.service.stats().unsettled == 0


async def test_killing_the_frozen_peer_settles_its_reads_for_good(bench: Bench) -> None:
    frozen = await frozen_pull(bench)
    frozen.peer.process.kill()
    await asyncio.wait_for(frozen.settled, 5)
    frozen.reuse()
    assert await frozen.overwritten() == 0


async def test_dropping_the_frozen_peer_does_not_end_the_quarantine(bench: Bench) -> None:
    frozen = await frozen_pull(bench)
    await frozen.service.disconnect("p")
    await asyncio.sleep(0.2)
    assert not frozen.settled.done()
    frozen.peer.signal(signal.SIGCONT)
    await asyncio.wait_for(frozen.settled, 20)
    frozen.reuse()
    assert await frozen.overwritten() == 0
