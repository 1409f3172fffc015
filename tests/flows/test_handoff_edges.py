"""The corners of a handoff: nothing to pull, nothing to decode, nobody to take over, no room, no interest."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.errors import DeadlineExceeded
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.ticket import TransferTicket
from pdserve.dispatch.replay import ReplayRules
from pdserve.telemetry.record import RequestRecord
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.clocks import ManualClock
from tests.flows.inproc import Answer, Cluster, NodeSpec, PairsOnly, open_cluster

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=6, ignore_eos=True, logprobs=True)
LONG = [(11 * i + 5) % VOCAB_SIZE for i in range(200)]
SPLIT = {
    "p": NodeSpec(role=Role.PREFILL, limits=EngineLimits(chunk_size=16, max_tokens_per_step=32)),
    "d": NodeSpec(role=Role.DECODE),
}


ONCE = ReplayRules(max_attempts=1)
PATIENT = Times(suspect=1e6)
"""For virtual time, which passes faster than sockets can answer heartbeats."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
async def split(checkpoint: Path) -> AsyncIterator[Cluster]:
    async with open_cluster(checkpoint, SPLIT, policy=PairsOnly(), replay=ONCE) as cluster:
        yield cluster


async def unified_answer(checkpoint: Path, prompt: list[int], sampling: SamplingParams) -> Answer:
    async with open_cluster(checkpoint, {"u": NodeSpec(role=Role.UNIFIED)}) as cluster:
        return await cluster.answer(prompt, sampling)


def stamps(answer: Answer, side: str) -> dict[str, float]:
    trace = answer.record.prefill_trace if side == "prefill" else answer.record.decode_trace
    assert trace is not None
    return dict(trace.stamps)


async def test_the_first_pull_completes_before_the_last_prefill_chunk_ends(split: Cluster) -> None:
    """Of five prompts, for the whole prefill takes a few milliseconds and a machine may look away for as long."""
    answers = [await split.answer([(shift + token) % VOCAB_SIZE for token in LONG], GREEDY) for shift in range(5)]
    early = [a for a in answers if stamps(a, "decode")["first_pull"] < stamps(a, "prefill")["prompt_computed"]]
    assert early
    assert all(a.record.decode_trace and a.record.decode_trace.transfer_pulls > 1 for a in early)


async def test_a_prompt_of_one_token(checkpoint: Path, split: Cluster) -> None:
    answer = await split.answer([7], GREEDY)
    assert answer.token_ids == (await unified_answer(checkpoint, [7], GREEDY)).token_ids
    await split.until_idle()


async def test_a_prompt_both_engines_know_is_neither_computed_nor_pulled_again(split: Cluster) -> None:
    prompt = LONG[:64]
    first = await split.answer(prompt, GREEDY)
    again = await split.answer(prompt, GREEDY)
    assert again.token_ids == first.token_ids
    assert again.logprobs == first.logprobs
    assert again.record.prefill_trace is not None
    assert again.record.decode_trace is not None
    assert again.record.prefill_trace.cached_tokens == 48
    assert again.record.decode_trace.cached_tokens == 64
    assert again.record.decode_trace.transfer_pulls == 0
    await split.until_idle()


async def test_a_first_token_that_stops_ends_the_request_on_the_prefill_engine(split: Cluster) -> None:
    prompt = LONG[:100]
    first = (await split.answer(prompt, GREEDY)).token_ids[0]
    answer = await split.answer(prompt[:], replace(GREEDY, stop_token_ids=(first,)))
    assert (answer.token_ids, answer.finish_reason) == ((first,), FinishReason.STOP)
    assert answer.record.decode_trace is None
    await split.until_idle()


async def test_max_tokens_one_never_reaches_the_decode_engine(split: Cluster) -> None:
    answer = await split.answer(LONG[:50], replace(GREEDY, max_tokens=1))
    assert (len(answer.token_ids), answer.finish_reason) == (1, FinishReason.LENGTH)
    await split.until_idle()


async def pass_time(clock: ManualClock, seconds: float) -> None:
    """Virtual seconds in small steps, with room for the sockets in between."""
    for _ in range(int(seconds / 0.25)):
        await clock.advance(0.25)
        await asyncio.sleep(0.004)


async def abandoned_ticket(cluster: Cluster, prompt: list[int]) -> TransferTicket:
    """A prefill nobody takes over."""
    request = Request(id="abandoned", prompt_token_ids=tuple(prompt), sampling=GREEDY)
    stream = cluster.sessions.client(cluster.engines["p"].endpoint).submit(request, handoff=True)
    ticket = await anext(stream)
    assert isinstance(ticket, TransferTicket)
    async for _ in stream:
        pass
    return ticket


async def test_a_lease_that_ends_does_not_disturb_another_request_of_the_same_prefix(checkpoint: Path) -> None:
    clock = ManualClock()
    prompt = LONG[:96]
    expected = await unified_answer(checkpoint, prompt, GREEDY)
    async with open_cluster(checkpoint, SPLIT, policy=PairsOnly(), clock=clock, times=PATIENT) as cluster:
        source = cluster.engines["p"].source
        await abandoned_ticket(cluster, prompt)
        await pass_time(clock, 9.5)
        assert source.num_open == 1
        other = asyncio.create_task(cluster.answer(prompt, GREEDY))
        await pass_time(clock, 1.0)
        assert (await other).token_ids == expected.token_ids
        assert source.num_open == 0
        assert (await cluster.answer(prompt, GREEDY)).token_ids == expected.token_ids
        await cluster.until_idle()


async def test_a_decode_engine_full_for_thirty_seconds_keeps_the_lease_and_serves_in_the_end(checkpoint: Path) -> None:
    clock = ManualClock()
    hog = replace(GREEDY, max_tokens=500)
    waiting_prompt = [(5 * i + 2) % VOCAB_SIZE for i in range(560)]
    expected = await unified_answer(checkpoint, waiting_prompt, GREEDY)
    specs = SPLIT | {"d": NodeSpec(role=Role.DECODE, num_blocks=40)}
    async with open_cluster(checkpoint, specs, policy=PairsOnly(), clock=clock, times=PATIENT) as cluster:
        running = asyncio.create_task(cluster.answer(LONG[:100], hog, timeout=500.0))
        while cluster.engines["d"].snapshot().running == 0:
            await asyncio.sleep(0.002)
        waiting = asyncio.create_task(cluster.answer(waiting_prompt, GREEDY, timeout=500.0))
        while cluster.engines["d"].snapshot().waiting == 0:
            await asyncio.sleep(0.002)
        for _ in range(10):
            await clock.advance(3.0)
            await asyncio.sleep(0.004)
        assert not running.done(), "the decode engine was not full for 30 s"
        assert len((await running).token_ids) == 500
        assert (await waiting).token_ids == expected.token_ids
        await cluster.until_idle()


@pytest.mark.parametrize("after", ["ticket", "first token", "third token"])
async def test_a_client_that_leaves_frees_everything(split: Cluster, after: str) -> None:
    request = Request(id="gone", prompt_token_ids=tuple(LONG), sampling=replace(GREEDY, max_tokens=100))
    stream = split.dispatcher.generate(request, RequestRecord(request_id="gone"))
    if after == "ticket":
        first = asyncio.ensure_future(anext(stream))
        while split.engines["p"].source.num_open == 0:
            await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.wait([first])
    else:
        for _ in range(1 if after == "first token" else 3):
            await anext(stream)
    await stream.aclose()
    await split.until_idle(deadline=1.0)


async def test_a_request_past_its_deadline_says_so_and_frees_everything(checkpoint: Path) -> None:
    clock = ManualClock()
    async with open_cluster(checkpoint, SPLIT, policy=PairsOnly(), clock=clock, times=PATIENT) as cluster:
        task = asyncio.create_task(cluster.answer(LONG, replace(GREEDY, max_tokens=300, min_tokens=300), timeout=2.0))
        while cluster.engines["d"].snapshot().running == 0:
            await asyncio.sleep(0.002)
        await pass_time(clock, 2.5)
        with pytest.raises(DeadlineExceeded, match="2 s"):
            await task
        await cluster.until_idle()


async def test_an_engine_that_leaves_fails_its_requests_at_once(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPLIT, policy=PairsOnly(), replay=ONCE) as cluster:
        task = asyncio.create_task(cluster.answer(LONG, replace(GREEDY, max_tokens=300)))
        while cluster.engines["d"].snapshot().running == 0:
            await asyncio.sleep(0.002)
        cluster.sessions.update((cluster.engines["p"].endpoint,))
        with pytest.raises(Exception, match="d has left the cluster"):
            await task
        await cluster.until_idle()
