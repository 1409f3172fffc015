"""In a real cluster, repeated prefixes reach the engines that hold them, and nothing else changes."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.cluster import Booked, EngineView, Mode
from pdserve.core.endpoint import Role
from pdserve.core.request import SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Answer, Cluster, NodeSpec, open_cluster

SPECS = {
    "p0": NodeSpec(role=Role.PREFILL),
    "p1": NodeSpec(role=Role.PREFILL),
    "d0": NodeSpec(role=Role.DECODE),
    "d1": NodeSpec(role=Role.DECODE),
}
GREEDY = SamplingParams(temperature=0, max_tokens=4, seed=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


def prompt(session: int, num_tokens: int) -> list[int]:
    return [(session * 31 + i * 7 + i // 16) % VOCAB_SIZE for i in range(num_tokens)]


async def told(cluster: Cluster, tokens: int) -> dict[str, EngineView]:
    """The views, once every engine's KV events of so many cached tokens have arrived."""
    async with asyncio.timeout(5):
        while len(cluster.sessions.index) * 16 < tokens:
            await asyncio.sleep(0.01)
    return {view.endpoint.engine_id: view for view in cluster.dispatcher.engines()}


def prefill_engine(answer: Answer) -> str:
    assert answer.record.prefill_trace is not None
    return answer.record.prefill_trace.engine_id


async def test_every_session_returns_to_the_engine_that_has_its_prefix(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS) as cluster:
        first = await asyncio.gather(*(cluster.answer(prompt(s, 96), GREEDY) for s in range(6)))
        homes = [prefill_engine(answer) for answer in first]
        assert set(homes) == {"p0", "p1"}
        await told(cluster, 2 * 6 * 96)
        for session in (3, 0, 5, 1, 4, 2):
            again = await cluster.answer(prompt(session, 110), GREEDY)
            assert prefill_engine(again) == homes[session]
            assert again.record.prefill_trace is not None
            assert again.record.prefill_trace.cached_tokens == 96


async def test_the_second_of_two_simultaneous_equal_prompts_follows_the_first(checkpoint: Path) -> None:
    """By the policy that looks for nothing else: kv_aware has an idle engine compute it too, which is sooner."""
    async with open_cluster(checkpoint, SPECS, policy="prefix") as cluster:
        answers = await asyncio.gather(*(cluster.answer(prompt(1, 200), GREEDY) for _ in range(2)))
        assert prefill_engine(answers[0]) == prefill_engine(answers[1])
        assert answers[0].token_ids == answers[1].token_ids


async def test_what_a_decode_engine_lacks_decides_whether_it_computes_the_prompt(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS, decode_local_below=32) as cluster:
        first = await cluster.answer(prompt(1, 96), GREEDY)
        assert first.record.route is not None
        assert first.record.route.mode is Mode.DISAGGREGATED
        await told(cluster, 2 * 96)
        follow_up = await cluster.answer(prompt(1, 110), GREEDY)
        assert follow_up.record.route is not None
        assert follow_up.record.route.mode is Mode.DECODE_LOCAL
        assert follow_up.record.route.decode == first.record.route.decode
        assert follow_up.record.cached_tokens == 96


async def test_every_policy_gives_the_same_tokens(checkpoint: Path) -> None:
    answers = []
    for policy in ("kv_aware", "prefix", "least_loaded", "round_robin"):
        async with open_cluster(checkpoint, SPECS, policy=policy, decode_local_below=32) as cluster:
            got = [(await cluster.answer(prompt(s % 2, 50 + s), GREEDY)).token_ids for s in range(4)]
            await cluster.until_idle()
        answers.append(got)
    assert all(got == answers[0] for got in answers)


async def test_engines_tell_their_size_and_how_long_steps_take(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS) as cluster:
        await asyncio.gather(*(cluster.answer(prompt(s, 64), GREEDY) for s in range(4)))
        async with asyncio.timeout(5):
            while True:
                views = {view.endpoint.engine_id: view for view in cluster.dispatcher.engines()}
                if sum(t.steps for view in views.values() if view.load for t in view.load.steps) >= 8:
                    break
                await asyncio.sleep(0.01)
        for view in views.values():
            assert view.capacity is not None
            assert (view.capacity.block_size, view.capacity.num_blocks) == (16, 64)
            assert view.capacity.max_len == 16 * 64
            assert "numba" in view.numerics, "on a CPU equal requests are promised equal bits"
            assert view.booked == Booked()


async def test_an_engine_that_leaves_is_forgotten(checkpoint: Path) -> None:
    async with open_cluster(checkpoint, SPECS) as cluster:
        home = prefill_engine(await cluster.answer(prompt(1, 96), GREEDY))
        await told(cluster, 2 * 96)
        kept = [engine.endpoint for name, engine in cluster.engines.items() if name != home]
        cluster.sessions.update(tuple(kept))
        again = await cluster.answer(prompt(1, 110), GREEDY)
        assert prefill_engine(again) != home
        assert again.record.prefill_trace is not None
        assert again.record.prefill_trace.cached_tokens == 0


async def test_handoffs_stay_within_the_domains_that_engines_name(checkpoint: Path) -> None:
    specs = {name: replace(spec, domain=f"rack-{name[1]}") for name, spec in SPECS.items()}
    async with open_cluster(checkpoint, specs) as cluster:
        answers = [await cluster.answer(prompt(session, 96), GREEDY) for session in range(6)]
        assert {view.domain for view in cluster.dispatcher.engines()} == {"rack-0", "rack-1"}
    for answer in answers:
        route = answer.record.route
        assert route
        assert route.prefill.engine_id[1] == route.decode.engine_id[1]
        assert f"within domain rack-{route.decode.engine_id[1]}" in route.reason
