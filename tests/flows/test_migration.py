"""A running sequence moves to another engine, and its client cannot tell."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.request import SamplingParams
from pdserve.dispatch.migration import MigrationRules
from pdserve.router.rules import RoutingRules
from pdserve.telemetry.record import MoveReason
from pdserve.transfer.loopback import LoopbackBackend
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Answer, Cluster, NodeSpec, PairsOnly, open_cluster
from tests.transfer_faults import FaultyBackend

STREAMS = 12
SPECS = {
    "p": NodeSpec(role=Role.PREFILL, limits=EngineLimits(chunk_size=32), num_blocks=256),
    "d0": NodeSpec(role=Role.DECODE, num_blocks=512),
    "d1": NodeSpec(role=Role.DECODE, num_blocks=512),
}


def sampling(number: int) -> SamplingParams:
    """Every way of choosing tokens that remembers something, and some that end early."""
    return SamplingParams(
        temperature=(0.0, 0.8, 1.3)[number % 3],
        top_p=(1.0, 0.9)[number % 2],
        repetition_penalty=(1.0, 1.3)[number // 2 % 2],
        seed=number,
        max_tokens=120 + number,
        min_tokens=(0, 60)[number % 2],
        logprobs=True,
        ignore_eos=number % 4 == 0,
    )


def prompt(number: int) -> list[int]:
    return [(13 * i + 7 * number + 3) % VOCAB_SIZE for i in range(20 + 11 * number)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
async def cluster(checkpoint: Path) -> AsyncIterator[Cluster]:
    """Both decode engines get their turn, however fast each is thought to be."""
    async with open_cluster(checkpoint, SPECS, policy="round_robin") as opened:
        yield opened


async def answers(cluster: Cluster) -> list[Answer]:
    return await asyncio.gather(*(cluster.answer(prompt(n), sampling(n)) for n in range(STREAMS)))


async def until_decoding(cluster: Cluster, engine_id: str, least: int) -> None:
    async with asyncio.timeout(20):
        while cluster.engines[engine_id].snapshot().running < least:
            await asyncio.sleep(0.002)


async def test_a_draining_engine_is_left_by_everything_and_nobody_notices(cluster: Cluster) -> None:
    undisturbed = await answers(cluster)
    running = asyncio.create_task(answers(cluster))
    await until_decoding(cluster, "d0", 3)
    assert await cluster.engines["d0"].drain(20)
    disturbed = await running
    moves = [move for answer in disturbed for move in answer.record.migrations]
    assert moves
    assert {(move.source, move.target, move.outcome) for move in moves} == {("d0", "d1", "ok")}
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.token_ids == before.token_ids
        assert after.logprobs == before.logprobs
        assert after.finish_reason == before.finish_reason
        assert after.record.failed == []
    await cluster.until_idle()


async def test_a_draining_prefill_engine_stays_until_its_last_lease_is_taken(checkpoint: Path) -> None:
    wires = {name: FaultyBackend(LoopbackBackend()) for name in ("d0", "d1")}
    specs = SPECS | {name: replace(SPECS[name], backend=wire) for name, wire in wires.items()}
    async with open_cluster(checkpoint, specs) as cluster:
        wanted = await answers(cluster)
        for wire in wires.values():
            wire.held = True
        running = asyncio.create_task(answers(cluster))
        prefill = cluster.engines["p"]
        async with asyncio.timeout(20):
            while not prefill.source.num_open or prefill.snapshot().running + prefill.snapshot().waiting:
                await asyncio.sleep(0.005)
        draining = asyncio.create_task(prefill.drain(20))
        await asyncio.sleep(0.1)
        assert not draining.done()
        for wire in wires.values():
            wire.held = False
        assert await draining
        assert [answer.token_ids for answer in await running] == [answer.token_ids for answer in wanted]
        assert all(not answer.record.failed for answer in await running)


async def test_a_request_with_nowhere_to_go_ends_where_it_is(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, {name: SPECS[name] for name in ("p", "d0")}) as cluster:
        wanted = await cluster.answer(prompt(1), sampling(1))
        running = asyncio.create_task(cluster.answer(prompt(1), sampling(1)))
        await until_decoding(cluster, "d0", 1)
        assert await cluster.engines["d0"].drain(20)
        assert (await running).token_ids == wanted.token_ids
        assert (await running).record.migrations == []


async def test_an_engine_that_has_everything_gives_some_of_it_up(checkpoint: Path) -> None:
    """The policy sends all to d0. KV beyond a fifth of its pool presses, so that moves do not hang on how fast this
    machine is."""
    specs = SPECS | {name: replace(SPECS[name], num_blocks=256) for name in ("d0", "d1")}
    rules = RoutingRules(
        decode_local_below=0, rebalance=True, rebalance_kv=0.2, rebalance_apart=1.1, rebalance_seconds=0.0
    )
    async with open_cluster(
        checkpoint,
        specs,
        policy=PairsOnly(),
        rules=rules,
        times=Times(heartbeat=0.1),
        migration=MigrationRules(pause=0.02),
    ) as cluster:
        disturbed = await answers(cluster)
        await cluster.until_idle()
    async with open_cluster(checkpoint, specs, policy=PairsOnly()) as cluster:
        undisturbed = await answers(cluster)
    moves = [move for answer in disturbed for move in answer.record.migrations]
    assert {(move.source, move.target, move.reason) for move in moves} == {("d0", "d1", MoveReason.REBALANCE)}
    assert "ok" in {move.outcome for move in moves}
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.token_ids == before.token_ids
        assert after.logprobs == before.logprobs
        assert after.record.failed == []


async def test_what_a_drain_cuts_off_goes_on_elsewhere_and_its_engine_has_not_died(checkpoint: Path) -> None:
    specs = {name: NodeSpec(role=Role.UNIFIED, num_blocks=512) for name in ("u0", "u1")}
    async with open_cluster(checkpoint, specs) as cluster:
        wanted = await cluster.answer(prompt(0), sampling(0))
        asked = asyncio.create_task(cluster.answer(prompt(0), sampling(0)))
        async with asyncio.timeout(20):
            while not (busy := [engine for engine in cluster.engines.values() if engine.snapshot().running]):
                await asyncio.sleep(0)
        [engine] = busy
        assert not await engine.drain(0.0)
        answer = await asked
    assert answer.token_ids == wanted.token_ids
    assert [attempt.code for attempt in answer.record.failed] == ["unavailable"]
