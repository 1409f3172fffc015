"""Checks of pairs over real gRPC: what they find, and that they leave nothing behind and disturb nobody."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import Role
from pdserve.core.pair_check import PairCheck, Transport
from pdserve.core.request import SamplingParams
from pdserve.rpc.pair_check import check_pair
from pdserve.transfer.loopback import LoopbackBackend
from tests.checkpoints import make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster
from tests.transfer_faults import FaultyBackend

TIMES = Times(pair_check=20)


@pytest.fixture
def backend() -> FaultyBackend:
    return FaultyBackend(LoopbackBackend())


@pytest.fixture
def times() -> Times:
    return TIMES


@pytest.fixture
async def cluster(tmp_path: Path, backend: FaultyBackend, times: Times) -> AsyncIterator[Cluster]:
    specs = {"p": NodeSpec(role=Role.PREFILL), "d": NodeSpec(role=Role.DECODE, backend=backend)}
    checkpoint = make_checkpoint(tmp_path, "qwen3")
    async with open_cluster(checkpoint, specs, times=times, policy=PairsOnly()) as cluster:
        yield cluster
        backend.held = False
        await cluster.until_idle()


async def check(cluster: Cluster) -> PairCheck:
    p, d = (cluster.engines[name].endpoint for name in "pd")
    return await check_pair(p, d, 20)


async def test_a_pair_that_works_is_measured_in_several_sizes(cluster: Cluster, backend: FaultyBackend) -> None:
    found = await check(cluster)
    assert found.error is None
    assert (found.source, found.target, found.backend, found.transport) == ("p", "d", "loopback", Transport.MEMORY)
    block_bytes = cluster.engines["d"].transfer.layout.block_bytes
    assert [size.num_bytes // block_bytes for size in found.sizes] == [1, 4, 8]
    assert all(size.seconds >= size.wire >= 0 and size.seconds > 0 and size.pulls >= 1 for size in found.sizes)
    assert found.round_trip is not None
    assert found.clock_offset is not None
    assert abs(found.clock_offset) < 1
    assert backend.posted == sum(size.pulls for size in found.sizes)


async def test_requests_run_on_with_the_same_tokens(cluster: Cluster) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=1)
    alone = await cluster.answer(range(1, 60), sampling)
    answer = asyncio.create_task(cluster.answer(range(1, 60), sampling, salt=b"other"))
    found = await asyncio.gather(*(check(cluster) for _ in range(3)))
    assert [one.error for one in found] == [None] * 3
    assert (await answer).token_ids == alone.token_ids


async def test_damaged_bytes_are_a_digest_mismatch(cluster: Cluster, backend: FaultyBackend) -> None:
    backend.damages = 2
    found = await check(cluster)
    assert found.error is not None
    assert found.error[0] == "digest_mismatch"
    assert (await check(cluster)).error is None


async def test_a_read_that_moves_nothing_does_not_verify(cluster: Cluster, backend: FaultyBackend) -> None:
    """Also right after a check that did move the same pattern's bytes."""
    assert (await check(cluster)).error is None
    backend.refusal = "nothing moves"
    found = await check(cluster)
    assert found.error is not None
    assert found.error[0] == "transfer_failed"
    assert "nothing moves" in found.error[1]


@pytest.mark.parametrize("times", [replace(TIMES, transfer_deadline=0.5)])
async def test_a_read_that_hangs_is_a_timeout_and_its_blocks_stay_quarantined_until_it_ends(
    cluster: Cluster, backend: FaultyBackend
) -> None:
    backend.held = True
    found = await check(cluster)
    assert found.error is not None
    assert found.error[0] == "transfer_timeout"
    target = cluster.engines["d"]
    assert target.snapshot().blocks.quarantined == 8
    backend.held = False
    await cluster.until_idle()


async def test_another_incarnation_of_the_source_is_not_checked(cluster: Cluster) -> None:
    p, d = (cluster.engines[name].endpoint for name in "pd")
    found = await check_pair(replace(p, epoch=p.epoch ^ 1), d, 20)
    assert found.error is not None
    assert found.error[0] == "stale_epoch"


async def test_engines_that_cannot_be_reached_are_named(cluster: Cluster) -> None:
    p, d = (cluster.engines[name].endpoint for name in "pd")
    nowhere = "127.0.0.1:1"
    lost = [await check_pair(replace(p, address=nowhere), d, 20), await check_pair(p, replace(d, address=nowhere), 20)]
    assert [one.error and one.error[0] for one in lost] == ["link_lost", "link_lost"]
    assert [one.error and one.error[1].split()[0] for one in lost] == ["p", "d"]
