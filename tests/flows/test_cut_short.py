"""An answer that the gateway ends, by a stop string or because its client left, tells what engines did for it."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.core.endpoint import Role
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.dispatch.connection import EngineConnection
from pdserve.gateway.answer import Answer
from pdserve.gateway.auth import Identity
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.tokenizer import Tokenizer
from tests.checkpoints import EOS_TOKEN_IDS, VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster

UNIFIED = {"u": NodeSpec(role=Role.UNIFIED)}
PAIR = {"p": NodeSpec(role=Role.PREFILL), "d": NodeSpec(role=Role.DECODE)}
PROMPT = tuple(range(64, 128))
MODEL = ModelInfo(name="tiny", revision="1", vocab_size=VOCAB_SIZE, max_model_len=512, eos_token_ids=EOS_TOKEN_IDS)
_IDS = count()


@dataclass(frozen=True)
class Served:
    cluster: Cluster
    gateway: Gateway

    def begin(self, *stop: str, salt: bytes = b"") -> Answer:
        sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=200, ignore_eos=True, stop=stop)
        ask = Ask(
            id=f"a{next(_IDS)}",
            endpoint="completions",
            prompt_token_ids=PROMPT,
            sampling=sampling,
            identity=Identity(salt=salt),
        )
        return self.gateway.begin(ask)

    async def stop_string(self) -> str:
        """Three characters that the answer to PROMPT first has somewhere behind its twentieth."""
        text = "".join([delta.text async for delta in self.begin(salt=b"another").deltas()])
        parts = ((at, text[at : at + 3]) for at in range(20, len(text) - 3))
        return next(part for at, part in parts if part.isascii() and part.isprintable() and text.find(part) == at)

    async def counted(self) -> dict[str, float]:
        """Everything the gateway has counted, summed over labels."""
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families((await self.gateway.exposition()).decode()):
            for sample in family.samples:
                counts[sample.name] = counts.get(sample.name, 0.0) + sample.value
        return counts

    def assert_nothing_left(self) -> None:
        for engine in self.cluster.engines.values():
            connection = self.cluster.sessions.client(engine.endpoint)
            assert isinstance(connection, EngineConnection)
            assert not connection._streams
        for view in self.cluster.dispatcher.engines():
            assert (view.booked.decoding, view.booked.prefilling) == ((), 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@asynccontextmanager
async def served(checkpoint: Path, specs: dict[str, NodeSpec]) -> AsyncIterator[Served]:
    policy = PairsOnly() if specs is PAIR else "kv_aware"
    async with open_cluster(checkpoint, specs, policy=policy) as cluster:
        yield Served(cluster, Gateway(cluster.dispatcher, Tokenizer.load(checkpoint), MODEL))


async def test_a_stop_string_hides_nothing_of_what_one_engine_did(checkpoint: Path) -> None:
    async with served(checkpoint, UNIFIED) as front:
        stop = await front.stop_string()
        [*_, last] = [delta async for delta in front.begin().deltas()]
        assert last.finish_reason is FinishReason.LENGTH
        before = await front.counted()
        answer = front.begin(stop)
        async for delta in answer.deltas():
            if delta.finish_reason:
                assert delta.finish_reason is FinishReason.STOP
                assert answer.cached_tokens > 0
                assert answer.record.decode_trace is not None
                assert "decode" in answer.record.durations()
        after = await front.counted()
        for name in ("pdserve_decode_seconds_count", "pdserve_prefill_seconds_count", "pdserve_queue_seconds_count"):
            assert after[name] == before[name] + 1
        front.assert_nothing_left()
        await front.cluster.until_idle()


async def test_a_stop_string_hides_no_transfer(checkpoint: Path) -> None:
    async with served(checkpoint, PAIR) as front:
        stop = await front.stop_string()
        before = await front.counted()
        answer = front.begin(stop)
        [*_, last] = [delta async for delta in answer.deltas()]
        assert last.finish_reason is FinishReason.STOP
        after = await front.counted()
        assert after["pdserve_transfers_total"] == before["pdserve_transfers_total"] + 1
        assert answer.record.decode_trace is not None
        assert answer.record.usage is not None
        assert answer.record.usage.link_bytes == answer.record.decode_trace.transfer_bytes > 0
        front.assert_nothing_left()
        await front.cluster.until_idle()


@pytest.mark.parametrize("specs", [UNIFIED, PAIR], ids=["unified", "pair"])
async def test_a_client_that_leaves_in_the_midst_leaves_a_record_and_nothing_else(
    checkpoint: Path, specs: dict[str, NodeSpec]
) -> None:
    async with served(checkpoint, specs) as front:
        answer = front.begin()
        async with aclosing(answer.deltas()) as deltas:
            for _ in range(3):
                await anext(deltas)
        assert answer.record.status == "cancelled"
        assert answer.record.decode_trace is not None
        front.assert_nothing_left()
        await front.cluster.until_idle()
