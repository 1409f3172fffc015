"""A peer that dies during a pull: the pull ends, its target settles, and a successor is readable."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from pdserve.core.errors import TransferFailed
from tests.contract.transfer_bench import KINDS, Bench, pull, spec_for
from tests.kv_layouts import GROUP, by_block, kv_layout

pytestmark = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.own_process], ids=str, indirect=True, scope="module"
)

BIG = replace(kv_layout(96, group=replace(GROUP, num_layers=8, num_kv_heads=8, head_dim=64)), block_size=32)
"""96 blocks of 1 MiB."""


@pytest.mark.parametrize("killed_after", [0.0, 0.005, 0.02])
async def test_a_pull_ends_and_settles_soon_after_the_peers_death(bench: Bench, killed_after: float) -> None:
    source, child = await bench.doomed_source(BIG)
    service, memory = await bench.target(BIG)
    await service.connect(source.address)
    blocks = tuple(range(BIG.num_blocks))
    running = service.pull(await spec_for(source, blocks, blocks[::-1], deadline=20))
    await asyncio.sleep(killed_after)
    child.process.kill()
    killed = time.monotonic()
    receipt = None
    with suppress(TransferFailed):
        receipt = await running.wait()
    await running.settled()
    assert time.monotonic() - killed < 3, "it takes a moment; the rest is a busy machine's"
    if receipt is not None:
        np.testing.assert_array_equal(by_block(BIG, memory.array)[::-1], by_block(BIG, source.bytes))


async def test_the_successor_of_a_killed_peer_is_readable(bench: Bench) -> None:
    layout = kv_layout(8)
    source, child = await bench.doomed_source(layout)
    service, memory = await bench.target(layout)
    await service.connect(source.address)
    await pull(service, await spec_for(source, (1,), (4,)))
    child.end()
    successor = await bench.source(layout)
    await service.connect(successor.address)
    await pull(service, await spec_for(successor, (1,), (5,)))
    np.testing.assert_array_equal(by_block(layout, memory.array)[5], by_block(layout, successor.bytes)[1])


async def test_a_peer_that_is_already_dead_cannot_be_connected_or_read_for_long(bench: Bench) -> None:
    layout = kv_layout(8)
    source, child = await bench.doomed_source(layout)
    service, _ = await bench.target(layout)
    spec = await spec_for(source, (1,), (4,), deadline=3)
    child.end()

    async def connect_and_pull() -> None:
        await service.connect(source.address)
        await pull(service, spec)

    with pytest.raises(TransferFailed):
        await connect_and_pull()
