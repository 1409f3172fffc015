"""A pull that stalls, lies or fails ends its request with the reason, and its blocks come back only when
nothing can write to them any more."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from pdserve.config.times import Times
from pdserve.core.cluster import Mode
from pdserve.core.endpoint import BlockCounts, EngineLimits, Role
from pdserve.core.errors import DigestMismatch, EngineDied, LeaseExpired, TransferFailed, TransferTimeout
from pdserve.core.request import SamplingParams
from pdserve.dispatch.replay import ReplayRules
from pdserve.transfer.loopback import LoopbackBackend
from pdserve.transfer.service import LocalTransferService
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster
from tests.transfer_faults import FaultyBackend

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=5, ignore_eos=True)
PROMPT = [(11 * i + 5) % VOCAB_SIZE for i in range(100)]
NUM_BLOCKS = -(-len(PROMPT) // 16)


@dataclass
class Faulty:
    cluster: Cluster
    wire: FaultyBackend

    def decode_blocks(self) -> BlockCounts:
        return self.cluster.engines["d"].snapshot().blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
async def faulty(checkpoint: Path) -> AsyncIterator[Faulty]:
    wire = FaultyBackend(LoopbackBackend())
    specs = {
        "p": NodeSpec(role=Role.PREFILL, limits=EngineLimits(chunk_size=32)),
        "d": NodeSpec(role=Role.DECODE, backend=wire),
    }
    once, short = ReplayRules(max_attempts=1), Times(transfer_deadline=0.3, quarantine=0.5)
    async with open_cluster(checkpoint, specs, times=short, policy=PairsOnly(), replay=once) as cluster:
        yield Faulty(cluster, wire)
        wire.held = False


async def test_a_stalled_pull_is_answered_at_its_deadline_and_its_blocks_wait_for_the_last_byte(
    faulty: Faulty,
) -> None:
    expected = (await faulty.cluster.answer(PROMPT[:20], GREEDY)).token_ids
    faulty.wire.held = True
    with pytest.raises(TransferTimeout, match=r"0\.3 s"):
        await faulty.cluster.answer(PROMPT, GREEDY)
    blocks = faulty.decode_blocks()
    assert 0 < blocks.quarantined <= NUM_BLOCKS
    assert blocks.free + blocks.quarantined == blocks.total
    assert faulty.cluster.engines["p"].source.num_open == 1, "the source must not reuse what may still be read"
    faulty.wire.held = False
    await faulty.cluster.until_idle()
    assert (await faulty.cluster.answer(PROMPT[:20], GREEDY)).token_ids == expected


async def test_one_damaged_arrival_is_read_again_unnoticed(faulty: Faulty) -> None:
    faulty.wire.damages = 1
    damaged = await faulty.cluster.answer(PROMPT, GREEDY)
    assert faulty.wire.damages == 0
    assert damaged.token_ids == (await faulty.cluster.answer(PROMPT, GREEDY)).token_ids
    await faulty.cluster.until_idle()


async def test_kv_that_stays_damaged_is_never_decoded(faulty: Faulty) -> None:
    faulty.wire.damages = 1000
    with pytest.raises(DigestMismatch):
        await faulty.cluster.answer(PROMPT, GREEDY)
    await faulty.cluster.until_idle()
    faulty.wire.damages = 0
    await faulty.cluster.answer(PROMPT, GREEDY)


async def test_a_refused_read_fails_the_request_and_the_next_one_works(faulty: Faulty) -> None:
    faulty.wire.held = True
    faulty.wire.refusal = "the wire is cut"
    with pytest.raises(TransferFailed, match="the wire is cut"):
        await faulty.cluster.answer(PROMPT, GREEDY)
    faulty.wire.held = False
    faulty.wire.refusal = ""
    await faulty.cluster.until_idle()
    await faulty.cluster.answer(PROMPT, GREEDY)


async def test_quarantine_that_lasts_has_the_engine_drain_and_say_why(faulty: Faulty) -> None:
    engine = faulty.cluster.engines["d"]
    overrun = asyncio.create_task(engine.overrun())
    faulty.wire.held = True
    with pytest.raises(TransferTimeout):
        await faulty.cluster.answer(PROMPT, GREEDY)
    blocks = faulty.decode_blocks()
    assert blocks.quarantined > 0.1 * blocks.total
    await asyncio.wait_for(overrun, 20)
    assert await engine.drain(5, cause="quarantine"), "nothing runs there"
    async with asyncio.timeout(5):
        while not (view := faulty.cluster.sessions.state().engines[-1]).load or not view.load.draining:
            await asyncio.sleep(0.01)
    assert (view.endpoint.engine_id, view.load.drain_cause) == ("d", "quarantine")


async def test_quarantine_that_ends_soon_is_no_reason_to_drain(faulty: Faulty) -> None:
    overrun = asyncio.create_task(faulty.cluster.engines["d"].overrun())
    faulty.wire.held = True
    with pytest.raises(TransferTimeout):
        await faulty.cluster.answer(PROMPT, GREEDY)
    faulty.wire.held = False
    await faulty.cluster.until_idle()
    await asyncio.wait({overrun}, timeout=1.0)
    assert not overrun.done()
    overrun.cancel()


@pytest.mark.parametrize("defect", ["pull", "digest"])
async def test_a_defect_in_the_transfer_ends_the_request_instead_of_hanging_it(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(LocalTransferService, defect, broken)
        with pytest.raises(TransferFailed):
            await asyncio.wait_for(faulty.cluster.answer(PROMPT, GREEDY), 10)
    await faulty.cluster.until_idle()
    await faulty.cluster.answer(PROMPT, GREEDY)


WORKER_DIED = "the worker process 7 was killed by SIGKILL"


async def died(*_: object) -> NoReturn:
    """Of a worker process that is gone."""
    raise EngineDied(WORKER_DIED)


class DeadPull:
    """In a worker process that is gone."""

    wait = died

    async def settled(self) -> None:
        return None

    def cancel(self) -> None:
        return None


@pytest.mark.parametrize(
    ("method", "broken", "code", "message", "goes_on"),
    [
        ("digest", died, LeaseExpired.code, f"p: {WORKER_DIED}", "d"),
        ("pull", lambda *_: DeadPull(), EngineDied.code, WORKER_DIED, "p"),
    ],
    ids=["source", "target"],
)
async def test_an_engine_whose_worker_dies_as_it_hands_over_takes_no_blameless_other_along(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    broken: object,
    code: str,
    message: str,
    goes_on: str,
) -> None:
    specs = {"p": NodeSpec(role=Role.PREFILL), "d": NodeSpec(role=Role.DECODE)}
    async with open_cluster(checkpoint, specs) as cluster:
        whole = await cluster.answer(PROMPT, GREEDY, salt=b"before")
        monkeypatch.setattr(LocalTransferService, method, broken)
        answer = await cluster.answer(PROMPT, GREEDY)
        [failed] = answer.record.failed
        assert (failed.route.mode, failed.code, failed.message) == (Mode.DISAGGREGATED, code, message)
        assert answer.record.route
        assert answer.record.route.decode.engine_id == goes_on
        assert answer.token_ids == whole.token_ids
        await cluster.until_idle()


async def test_a_client_that_leaves_during_a_pull_leaves_its_blocks_quarantined_until_it_lands(
    faulty: Faulty,
) -> None:
    faulty.wire.held = True
    task = asyncio.create_task(faulty.cluster.answer(PROMPT, GREEDY))
    while not faulty.wire.posted:
        await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.wait([task])
    while faulty.decode_blocks().used:
        await asyncio.sleep(0.002)
    assert faulty.decode_blocks().quarantined > 0
    faulty.wire.held = False
    await faulty.cluster.until_idle(deadline=1.0)
