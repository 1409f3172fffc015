"""What every transfer backend must do, between two memories and, where it can, two processes."""

import asyncio
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pdserve.core.errors import DigestMismatch, LayoutMismatch, StaleEpoch, TransferFailed
from pdserve.core.layout import KVOrder
from pdserve.core.protocols import PeerAddress
from tests.contract.sources import InChild
from tests.contract.transfer_bench import KINDS, SEED, Bench, pull, spec_for
from tests.kv_layouts import by_block, kv_layout

pytestmark = pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True, scope="module")

REGIONS = {
    "one block": ((3,), (8,)),
    "adjacent blocks": ((4, 5, 6, 7), (0, 1, 2, 3)),
    "permuted blocks": ((9, 2, 30, 3, 4, 17, 0, 31), (5, 1, 23, 4, 8, 7, 0, 2)),
}


@pytest.mark.parametrize(("source_order", "target_order"), list(product(KVOrder, KVOrder)))
async def test_regions_of_every_shape_arrive_whole_and_touch_nothing_else(
    bench: Bench, source_order: KVOrder, target_order: KVOrder
) -> None:
    source = await bench.source(kv_layout(32, source_order))
    service, memory = await bench.target(kv_layout(24, target_order))
    assert await service.connect(source.address) == bench.kind.backend
    for source_blocks, target_blocks in REGIONS.values():
        expected = by_block(service.layout, memory.array.copy())
        expected[list(target_blocks)] = by_block(source.layout, source.bytes)[list(source_blocks)]
        receipt = await pull(service, await spec_for(source, source_blocks, target_blocks))
        np.testing.assert_array_equal(by_block(service.layout, memory.array), expected)
        assert receipt.num_bytes == len(source_blocks) * service.layout.block_bytes
        assert receipt.backend == bench.kind.backend


async def test_unused_slots_of_the_last_block_arrive_as_zeros(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    service, memory = await bench.target(kv_layout(8, KVOrder.LAYER_MAJOR))
    await service.connect(source.address)
    digest = await source.digest((6, 2), 5, SEED)
    await pull(service, replace(await spec_for(source, (6, 2), (0, 1)), digest=digest))
    arrived = by_block(service.layout, memory.array)
    np.testing.assert_array_equal(arrived[0], by_block(source.layout, source.bytes)[6])
    np.testing.assert_array_equal(arrived[1, :, :, :, 0], by_block(source.layout, source.bytes)[2, :, :, :, 0])
    assert not arrived[1, :, :, :, 1:].any()


async def test_pulls_in_flight_together_do_not_mix(bench: Bench) -> None:
    sources = [await bench.source(kv_layout(16), engine_id=f"p{i}") for i in range(2)]
    service, memory = await bench.target(kv_layout(16))
    for source in sources:
        await service.connect(source.address)
    specs = [await spec_for(sources[i % 2], (i, 15 - i), (2 * i, 2 * i + 1)) for i in range(8)]
    await asyncio.gather(*(pull(service, spec) for spec in specs))
    arrived = by_block(service.layout, memory.array)
    for i, spec in enumerate(specs):
        expected = by_block(sources[i % 2].layout, sources[i % 2].bytes)[list(spec.source_blocks)]
        np.testing.assert_array_equal(arrived[list(spec.target_blocks)], expected)
    assert service.stats().unsettled == 0


async def test_another_model_revision_or_block_size_is_refused_at_the_handshake(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    for other in (replace(kv_layout(8), model_revision="other"), replace(kv_layout(8), block_size=8)):
        service, _ = await bench.target(other)
        with pytest.raises(LayoutMismatch, match="same model revision"):
            await service.connect(source.address)


async def test_peers_without_a_common_backend_are_told_what_each_side_has(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    service, _ = await bench.target(kv_layout(8))
    (rank,) = source.address.ranks
    (offer,) = rank.backends
    with pytest.raises(TransferFailed, match=f"offers nccl, this worker has {bench.kind.backend}"):
        await service.connect(offering(source.address, "nccl", offer[1]))
    with pytest.raises(TransferFailed, match="no transfer backend reaches p"):
        await service.connect(offering(source.address, offer[0], b"\xc1"))


def offering(peer: PeerAddress, backend: str, metadata: bytes) -> PeerAddress:
    """A peer of one rank that offers another backend than it does."""
    return replace(peer, ranks=(replace(peer.ranks[0], backends=((backend, metadata),)),))


async def test_bytes_damaged_at_the_source_are_never_accepted(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    service, _ = await bench.target(kv_layout(8))
    await service.connect(source.address)
    spec = await spec_for(source, (1, 6), (2, 3))
    wrong = int(source.bytes[6 * source.layout.block_bytes]) ^ 1
    await source.write(6 * source.layout.block_bytes, bytes([wrong]))
    with pytest.raises(DigestMismatch, match="2 times"):
        await pull(service, spec)
    assert service.stats().rereads == 1
    with pytest.raises(DigestMismatch):
        await pull(service, replace(spec, source_blocks=(6, 1), digest=spec.digest))
    await pull(service, await spec_for(source, (1, 6), (2, 3)))


async def test_a_restarted_peer_is_readable_under_its_new_epoch_only(bench: Bench) -> None:
    service, memory = await bench.target(kv_layout(8))
    first = await bench.source(kv_layout(8))
    await service.connect(first.address)
    old = await spec_for(first, (1,), (4,))
    await pull(service, old)
    second = await bench.source(kv_layout(8))
    await service.connect(second.address)
    with pytest.raises(StaleEpoch):
        await pull(service, old)
    await pull(service, await spec_for(second, (1,), (5,)))
    arrived = by_block(service.layout, memory.array)
    np.testing.assert_array_equal(arrived[4], by_block(first.layout, first.bytes)[1])
    np.testing.assert_array_equal(arrived[5], by_block(second.layout, second.bytes)[1])


async def test_a_disconnected_peer_is_not_read(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    service, _ = await bench.target(kv_layout(8))
    await service.connect(source.address)
    spec = await spec_for(source, (1,), (4,))
    await service.disconnect("p")
    await service.disconnect("p")
    with pytest.raises(TransferFailed, match="not connected"):
        await pull(service, spec)
    await service.connect(source.address)
    await pull(service, spec)


async def test_an_idle_worker_costs_no_processor_time_and_says_nothing_on_stdout(bench: Bench) -> None:
    source = await bench.source(kv_layout(8))
    service, _ = await bench.target(kv_layout(8))
    await service.connect(source.address)
    await pull(service, await spec_for(source, (1,), (4,)))
    before, own = await source.cpu_seconds(), time.process_time()
    await asyncio.sleep(1)
    assert await source.cpu_seconds() - before < 0.3
    assert time.process_time() - own < 0.3
    if isinstance(bench.driver, InChild):
        assert bench.driver.stdout() == b""
