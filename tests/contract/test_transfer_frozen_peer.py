"""A peer that freezes during a pull: no byte reaches a block whose pull has settled, whatever the peer does later."""

import asyncio
import signal
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from pdserve.core.errors import TransferError, TransferTimeout
from pdserve.transfer.service import LocalTransferService
from tests.contract.sources import Source
from tests.contract.transfer_bench import KINDS, Bench, pull, spec_for
from tests.kv_layouts import GROUP, by_block, kv_layout

pytestmark = [
    pytest.mark.parametrize(
        "kind", [kind for kind in KINDS if kind.own_process], ids=str, indirect=True, scope="module"
    ),
    pytest.mark.timeout(60),
]

BIG = replace(kv_layout(33, group=replace(GROUP, num_layers=8, num_kv_heads=8, head_dim=64)), block_size=32)
"""33 blocks of 1 MiB, more than the sockets between two processes hold."""

BLOCKS = tuple(range(32))
REUSED = 0xA5
STAGED = ("gloo", "grpc")
"""Backends whose reads can be broken off."""

DEADLINE = 0.5


async def test_a_frozen_peers_pull_ends_at_its_deadline_and_its_blocks_are_safe_once_it_has_settled(
    bench: Bench,
) -> None:
    source, peer = await bench.doomed_source(BIG)
    service, memory = await bench.target(BIG)
    await service.connect(source.address)
    await pull(service, await spec_for(source, (32,), (32,)))
    spec = await spec_for(source, BLOCKS, BLOCKS, deadline=DEADLINE)
    peer.signal(signal.SIGSTOP)
    running, begun = service.pull(spec), time.monotonic()
    try:
        # Where the kernel or a mapping reads the peer's memory, the peer need not run.
        await running.wait()
        expected = by_block(BIG, source.bytes)[:32]
        np.testing.assert_array_equal(by_block(BIG, memory.array)[:32], expected)
        return
    except TransferTimeout:
        assert time.monotonic() - begun >= DEADLINE
    settled = asyncio.ensure_future(running.settled())
    if bench.kind.backend in STAGED:
        await asyncio.wait_for(asyncio.shield(settled), 5)
    else:
        await asyncio.sleep(0.1)
        assert not settled.done(), "what cannot be cancelled stays in quarantine"
        peer.signal(signal.SIGCONT)
        await asyncio.wait_for(settled, 20)
    memory.array[:] = REUSED
    peer.signal(signal.SIGCONT)
    await asyncio.sleep(0.3)
    assert int(np.count_nonzero(memory.array != REUSED)) == 0
    assert service.stats().unsettled == 0


async def test_a_peer_that_resumed_is_readable_again(bench: Bench) -> None:
    source, peer = await bench.doomed_source(BIG)
    service, memory = await bench.target(BIG)
    await service.connect(source.address)
    spec = await spec_for(source, BLOCKS, BLOCKS, deadline=DEADLINE)
    peer.signal(signal.SIGSTOP)
    running = service.pull(spec)
    with suppress(TransferTimeout):
        await running.wait()
    peer.signal(signal.SIGCONT)
    await asyncio.wait_for(running.settled(), 20)
    memory.array[:] = REUSED
    await service.connect(source.address)
    async with asyncio.timeout(30):
        while not await _pulled(source, service):
            await asyncio.sleep(0.1)
    np.testing.assert_array_equal(by_block(BIG, memory.array)[:32], by_block(BIG, source.bytes)[:32])


async def test_a_peer_that_is_frozen_when_it_is_connected_holds_up_no_other(bench: Bench) -> None:
    well, another = await bench.source(BIG), await bench.source(BIG, engine_id="another")
    frozen, peer = await bench.doomed_source(BIG, "frozen")
    service, _ = await bench.target(BIG)
    await service.connect(well.address)
    spec = await spec_for(well, (0,), (0,))
    from_another = await spec_for(another, (1,), (1,))
    peer.signal(signal.SIGSTOP)
    connecting = asyncio.ensure_future(service.connect(frozen.address))
    await pull(service, spec)
    await service.connect(another.address)
    await pull(service, from_another)
    given_up = connecting.done() and connecting.exception()
    assert not given_up, "the others waited until the frozen one was given up"
    peer.signal(signal.SIGCONT)
    await asyncio.wait_for(connecting, 10)
    await pull(service, await spec_for(frozen, (2,), (2,)))


async def _pulled(source: Source, service: LocalTransferService) -> bool:
    """Whether one pull of everything works; the peer may take a moment to come round."""
    try:
        await pull(service, await spec_for(source, BLOCKS, BLOCKS, deadline=10))
    except TransferError:
        await service.connect(source.address)
        return False
    return True
