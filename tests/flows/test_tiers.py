"""Conversations that need ten times the device pool: the same answers as with room for everything, mostly without
computing what was there before, also after a restart."""

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from pdserve.core.cluster import Mode
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.layout import KVOrder
from pdserve.core.request import SamplingParams
from pdserve.core.tiers import Tier, TierTally
from pdserve.tiers.spec import TierSpec
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster

BLOCK_SIZE = 8
NUM_BLOCKS = 14
CONVERSATIONS, TURNS = 13, 3
OUTPUT = 6
LIMITS = EngineLimits(chunk_size=32, max_tokens_per_step=64, max_rows=3, max_model_len=112)
SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=OUTPUT, ignore_eos=True)

Transcript = list[tuple[int, ...]]


@pytest.fixture(autouse=True)
def _restore_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether restoring is faster than computing depends on the machine: not here."""
    monkeypatch.setattr("pdserve.engine.tiering.seconds_per_token", lambda steps: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def turn(conversation: int, number: int) -> list[int]:
    return Random(1000 * conversation + number).choices(range(3, VOCAB_SIZE), k=24)


async def talk(cluster: Cluster, *, rounds: range, history: dict[int, list[int]]) -> Transcript:
    """All conversations go on by one turn after the other, three at a time; the answers in order."""
    answers: Transcript = []
    for number in rounds:
        for first in range(0, CONVERSATIONS, 3):
            group = range(first, min(first + 3, CONVERSATIONS))
            for conversation in group:
                history.setdefault(conversation, []).extend(turn(conversation, number))
            said = await asyncio.gather(*(cluster.answer(history[c], SAMPLING) for c in group))
            for conversation, answer in zip(group, said, strict=True):
                history[conversation] += answer.token_ids
                answers.append(answer.token_ids)
    return answers


def unified(tiers: TierSpec | None, *, num_blocks: int = NUM_BLOCKS, order: KVOrder = KVOrder.BLOCK_MAJOR) -> NodeSpec:
    return NodeSpec(
        role=Role.UNIFIED, limits=LIMITS, num_blocks=num_blocks, block_size=BLOCK_SIZE, order=order, tiers=tiers
    )


def block_bytes(cluster: Cluster) -> int:
    return cluster.engines["u"].transfer.layout.block_bytes


def tallies(cluster: Cluster, engine: str) -> dict[Tier, TierTally]:
    return {tally.tier: tally for tally in cluster.engines[engine].snapshot().tiers}


async def reference(checkpoint: Path, rounds: range) -> Transcript:
    async with open_cluster(checkpoint, {"u": unified(None, num_blocks=400)}) as roomy:
        return await talk(roomy, rounds=rounds, history={})


@pytest.mark.parametrize("order", KVOrder)
async def test_conversations_ten_times_the_pool_are_answered_as_with_room_for_all(
    checkpoint: Path, tmp_path: Path, order: KVOrder
) -> None:
    expected = await reference(checkpoint, range(TURNS))
    working_set = CONVERSATIONS * TURNS * (24 + OUTPUT) // BLOCK_SIZE
    assert working_set >= 10 * NUM_BLOCKS
    spec = TierSpec(host_bytes=2**17, disk_path=tmp_path, disk_bytes=2**23)
    async with open_cluster(checkpoint, {"u": unified(spec, order=order)}) as tight:
        assert await talk(tight, rounds=range(TURNS), history={}) == expected
        await tight.until_idle()
        held = tallies(tight, "u")
    assert held[Tier.HOST].capacity < working_set
    for tally in held.values():
        assert tally.restored_blocks > 0, tally
        assert (tally.corrupt, tally.failed) == (0, 0)


async def test_a_restarted_engine_goes_on_from_its_disk(checkpoint: Path, tmp_path: Path) -> None:
    expected = await reference(checkpoint, range(TURNS))
    spec = TierSpec(host_bytes=2**15, disk_path=tmp_path, disk_bytes=2**23)
    history: dict[int, list[int]] = {}
    answers: Transcript = []
    restored = []
    for number in range(TURNS):
        async with open_cluster(checkpoint, {"u": unified(spec)}) as cluster:
            answers += await talk(cluster, rounds=range(number, number + 1), history=history)
            await cluster.until_idle()
            restored.append(tallies(cluster, "u")[Tier.DISK].restored_blocks)
    assert answers == expected
    assert restored[0] == 0
    assert min(restored[1:]) > 0


async def test_a_handoff_starts_from_what_the_prefill_engines_tiers_hold(checkpoint: Path) -> None:
    expected = await reference(checkpoint, range(2))
    spec = TierSpec(host_bytes=2**22)
    nodes = {
        "p": replace(unified(spec), role=Role.PREFILL),
        "d": replace(unified(spec), role=Role.DECODE, num_blocks=40),
    }
    async with open_cluster(checkpoint, nodes, policy=PairsOnly()) as split:
        history: dict[int, list[int]] = {}
        assert await talk(split, rounds=range(2), history=history) == expected
        answer = await split.answer(history[0], SAMPLING)
        assert answer.record.route is not None
        assert answer.record.route.mode is Mode.DISAGGREGATED
        await split.until_idle()
        assert tallies(split, "p")[Tier.HOST].restored_blocks > 0
        assert tallies(split, "d")[Tier.HOST].saved_bytes > 0
