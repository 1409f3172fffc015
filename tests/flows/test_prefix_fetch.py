"""The second turn of a conversation on a prefill engine that has never seen it: the history's KV comes from the decode
engine that wrote the first answer. Tokens are those of one engine, and whatever becomes of the fetch, so they stay."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.blocks import block_hashes, hash_namespace
from pdserve.core.cluster import ClusterState, EngineView, FetchPlan, Route, RouteAsk
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.request import PrefixFetch, SamplingParams
from pdserve.core.ticket import KVSource
from pdserve.tiers.spec import TierSpec
from pdserve.transfer.loopback import LoopbackBackend
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Answer, Cluster, NodeSpec, PairsOnly, open_cluster
from tests.transfer_faults import FaultyBackend

BLOCK_SIZE = 16
FIRST = [(11 * i + 5) % VOCAB_SIZE for i in range(100)]
QUESTION = [(7 * i + 3) % VOCAB_SIZE for i in range(30)]
SAMPLING = SamplingParams(temperature=0.8, seed=7, max_tokens=40, ignore_eos=True, logprobs=True)
TIMES = Times(fetch_deadline=1.5, lease=4.0)
HELD_TOKENS = (len(FIRST) + SAMPLING.max_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
"""Of the first turn, on the decode engine; the last token's KV is never written."""


class FetchingPairs(PairsOnly):
    """Prefill on one engine of choice, and fetch what another one, if it is to be, has announced."""

    prefill = "p0"
    source = ""
    least_blocks = 1
    blocks: int | None = None
    """What the source is said to hold; None is what it has announced."""

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        views = {view.endpoint.engine_id: view for view in state.engines}
        route = replace(super().choose(ask, state), prefill=views[self.prefill].endpoint)
        return replace(route, fetch=self._plan(ask, views[self.source])) if self.source else route

    def _plan(self, ask: RouteAsk, source: EngineView) -> FetchPlan:
        blocks = self.blocks or ask.hits[source.key].tokens // BLOCK_SIZE
        endpoint = source.endpoint
        hint = KVSource(
            engine_id=endpoint.engine_id,
            epoch=endpoint.epoch,
            address=endpoint.address,
            num_blocks=blocks,
            least_blocks=self.least_blocks,
        )
        return FetchPlan(source=hint, tokens=blocks * BLOCK_SIZE, seconds=0.001, saved_seconds=0.1)


@dataclass
class Bench:
    """Two prefill engines and a decode engine; wire is what the second prefill engine reads over."""

    cluster: Cluster
    policy: FetchingPairs
    wire: FaultyBackend
    expected: tuple[Answer, Answer]

    async def first_turn(self) -> list[int]:
        """Answered by p0 and d; returns what the second turn asks p1."""
        answer = await self.cluster.answer(FIRST, SAMPLING)
        assert answer.token_ids == self.expected[0].token_ids
        self.policy.prefill, self.policy.source = "p1", "d"
        await self.announced("d", [*FIRST, *answer.token_ids], HELD_TOKENS)
        return [*FIRST, *answer.token_ids, *QUESTION]

    async def second_turn(self) -> Answer:
        answer = await self.cluster.answer(await self.first_turn(), SAMPLING)
        self.check(answer)
        return answer

    def check(self, answer: Answer) -> None:
        assert answer.token_ids == self.expected[1].token_ids
        assert answer.logprobs == self.expected[1].logprobs

    async def announced(self, engine_id: str, tokens: list[int], held: int) -> None:
        """Until the router knows that an engine holds so many of the tokens."""
        index, engine = self.cluster.sessions.index, self.cluster.engines[engine_id]
        hashes = block_hashes(tokens, BLOCK_SIZE, hash_namespace(b"", engine.info.revision))
        key = engine.endpoint.engine_id, engine.endpoint.epoch
        async with asyncio.timeout(10):
            while (hit := index.match(hashes, 0.0).get(key)) is None or hit.blocks * BLOCK_SIZE < held:
                await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[Answer, Answer]:
    """What one engine says."""

    async def talk() -> tuple[Answer, Answer]:
        async with open_cluster(checkpoint, {"u": NodeSpec(role=Role.UNIFIED)}) as whole:
            first = await whole.answer(FIRST, SAMPLING)
            return first, await whole.answer([*FIRST, *first.token_ids, *QUESTION], SAMPLING)

    return asyncio.run(talk())


@pytest.fixture
async def bench(checkpoint: Path, expected: tuple[Answer, Answer]) -> AsyncIterator[Bench]:
    async with open_bench(checkpoint, expected) as opened:
        yield opened


@asynccontextmanager
async def open_bench(
    checkpoint: Path, expected: tuple[Answer, Answer], *, decode: NodeSpec | None = None
) -> AsyncIterator[Bench]:
    wire, policy = FaultyBackend(LoopbackBackend()), FetchingPairs()
    specs = {
        "p0": NodeSpec(role=Role.PREFILL),
        "p1": NodeSpec(role=Role.PREFILL, backend=wire, limits=EngineLimits(chunk_size=32)),
        "d": decode or NodeSpec(role=Role.DECODE),
    }
    async with open_cluster(checkpoint, specs, times=TIMES, policy=policy) as cluster:
        yield Bench(cluster, policy, wire, expected)
        wire.held = False


def fetch_of(answer: Answer) -> PrefixFetch:
    assert answer.record.prefill_trace
    assert answer.record.prefill_trace.engine_id == "p1"
    assert answer.record.prefill_trace.fetch
    return answer.record.prefill_trace.fetch


async def test_the_history_comes_from_the_decode_engine_and_the_tokens_are_those_of_one_engine(bench: Bench) -> None:
    answer = await bench.second_turn()
    fetch = fetch_of(answer)
    assert (fetch.engine_id, fetch.tokens, fetch.error) == ("d", HELD_TOKENS, "")
    assert fetch.num_bytes == HELD_TOKENS // BLOCK_SIZE * bench.cluster.engines["d"].transfer.layout.block_bytes
    assert fetch.backend
    assert answer.record.cached_tokens == HELD_TOKENS
    computed = sum(tally.tokens for tally in bench.cluster.engines["p1"].snapshot().steps)
    assert computed == len(FIRST) + SAMPLING.max_tokens + len(QUESTION) - HELD_TOKENS
    await bench.cluster.until_idle()


async def test_what_was_fetched_is_cached_and_announced(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.check(await bench.cluster.answer(prompt, SAMPLING))
    await bench.announced("p1", prompt, len(prompt) // BLOCK_SIZE * BLOCK_SIZE)
    bench.policy.source = ""
    again = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(again)
    assert again.record.cached_tokens == len(prompt) // BLOCK_SIZE * BLOCK_SIZE


async def test_blocks_the_reader_has_already_are_not_fetched(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.policy.source = ""
    await bench.cluster.answer(prompt[:48], SAMPLING)
    bench.policy.source = "d"
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert fetch_of(answer).tokens == HELD_TOKENS - 48


async def test_too_few_blocks_are_computed(bench: Bench) -> None:
    bench.policy.least_blocks = HELD_TOKENS // BLOCK_SIZE + 1
    answer = await bench.second_turn()
    assert answer.record.prefill_trace
    assert answer.record.prefill_trace.fetch is None
    assert answer.record.cached_tokens == 0


async def test_a_source_that_holds_less_than_was_thought_lends_what_it_has(bench: Bench) -> None:
    prompt = await bench.first_turn()
    lender = bench.cluster.engines["d"]
    held = lender._core.kv._cache._blocks
    hashes = block_hashes(prompt, BLOCK_SIZE, hash_namespace(b"", lender.info.revision))
    gone = [held[hashes[5]]]
    lender._core.kv._cache.forget(gone)
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert fetch_of(answer).tokens == 5 * BLOCK_SIZE


async def test_another_tenants_blocks_are_not_lent(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.policy.blocks = HELD_TOKENS // BLOCK_SIZE
    answer = await bench.cluster.answer(prompt, SAMPLING, salt=b"tenant")
    bench.check(answer)
    assert (fetch_of(answer).error, answer.record.cached_tokens) == ("unavailable", 0)


async def test_a_draining_source_refuses_and_the_prompt_is_computed(bench: Bench) -> None:
    prompt = await bench.first_turn()
    await bench.announced("p0", FIRST, 96)
    bench.policy.source = "p0"
    bench.cluster.engines["p0"]._draining = True
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert (fetch_of(answer).error, answer.record.cached_tokens) == ("unavailable", 0)


async def test_a_stalled_read_is_given_up_and_its_blocks_wait_for_its_end(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.wire.held = True
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert fetch_of(answer).error == "transfer_timeout"
    assert answer.record.cached_tokens == 0
    blocks = bench.cluster.engines["p1"].snapshot().blocks
    assert blocks.quarantined == HELD_TOKENS // BLOCK_SIZE
    assert bench.cluster.engines["d"].source.num_open == 1, "the source must not reuse what may still be read"
    bench.wire.held = False
    await bench.cluster.until_idle()


async def test_damage_that_stays_is_never_computed_from(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.wire.damages = 2
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert (fetch_of(answer).error, answer.record.cached_tokens) == ("digest_mismatch", 0)
    await bench.cluster.until_idle()


async def test_a_refused_read_is_no_matter(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.wire.held, bench.wire.refusal = True, "the wire is cut"
    answer = await bench.cluster.answer(prompt, SAMPLING)
    bench.check(answer)
    assert fetch_of(answer).error == "transfer_failed"
    bench.wire.held, bench.wire.refusal = False, ""
    await bench.cluster.until_idle()


async def test_a_client_that_leaves_during_a_fetch_leaves_nothing_behind(bench: Bench) -> None:
    prompt = await bench.first_turn()
    bench.wire.held = True
    task = asyncio.create_task(bench.cluster.answer(prompt, SAMPLING))
    async with asyncio.timeout(10):
        while not bench.wire.posted:
            await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.wait([task])
    p1 = bench.cluster.engines["p1"]
    async with asyncio.timeout(10):
        while p1.snapshot().blocks.used:
            await asyncio.sleep(0.002)
    assert p1.snapshot().blocks.quarantined == HELD_TOKENS // BLOCK_SIZE
    bench.wire.held = False
    await bench.cluster.until_idle()


async def test_what_the_source_holds_in_a_tier_is_restored_and_lent(
    checkpoint: Path, expected: tuple[Answer, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether restoring is faster than computing depends on the machine: not here."""
    monkeypatch.setattr("pdserve.engine.tiering.seconds_per_token", lambda steps: None)
    decode = NodeSpec(role=Role.DECODE, num_blocks=40, tiers=TierSpec(host_bytes=2**24))
    async with open_bench(checkpoint, expected, decode=decode) as bench:
        prompt = await bench.first_turn()
        lender = bench.cluster.engines["d"]
        hashes = block_hashes(prompt, BLOCK_SIZE, hash_namespace(b"", lender.info.revision))
        bench.policy.prefill, bench.policy.source = "p0", ""
        for other in range(4):
            await bench.cluster.answer([other] * 400, replace(SAMPLING, max_tokens=2))
        assert len(lender._core.kv._cache.lookup(hashes)) < 4, "most of it has left the device pool"
        bench.policy.prefill, bench.policy.source = "p1", "d"
        answer = await bench.cluster.answer(prompt, SAMPLING)
        bench.check(answer)
        assert fetch_of(answer).tokens >= 4 * BLOCK_SIZE
        assert 0 < fetch_of(answer).restore_seconds < fetch_of(answer).seconds
        (host,) = lender.snapshot().tiers
        assert host.restored_blocks > 0
        await bench.cluster.until_idle()
