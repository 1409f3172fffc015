"""Whatever the prompt, sampling, cache state and concurrency: prefill + decode engines emit exactly what one
engine emits, and leave nothing behind."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.core.cluster import Mode
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.layout import KVOrder
from pdserve.core.request import SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster

CASES = 500
BLOCK_SIZE = 8


class Pair:
    """A 1P1D cluster and a unified engine with unlike limits, on one event loop."""

    def __init__(self, checkpoint: Path) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._checkpoint = checkpoint
        self.split, self.whole = self._runner.run(self._open())

    async def _open(self) -> tuple[Cluster, Cluster]:
        split = open_cluster(
            self._checkpoint,
            {
                "p": NodeSpec(
                    role=Role.PREFILL, limits=EngineLimits(chunk_size=24, max_tokens_per_step=40), block_size=BLOCK_SIZE
                ),
                "d": NodeSpec(
                    role=Role.DECODE,
                    limits=EngineLimits(max_rows=4),
                    num_blocks=48,
                    block_size=BLOCK_SIZE,
                    order=KVOrder.LAYER_MAJOR,
                ),
            },
            policy=PairsOnly(),
        )
        whole = open_cluster(
            self._checkpoint,
            {"u": NodeSpec(role=Role.UNIFIED, limits=EngineLimits(depth=1, prefix_caching=False))},
        )
        return await self._stack.enter_async_context(split), await self._stack.enter_async_context(whole)

    def compare(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> None:
        self._runner.run(self._compare(prompts, sampling))

    async def _compare(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> None:
        ours = await asyncio.gather(*map(self.split.answer, prompts, sampling))
        for prompt, params, answer in zip(prompts, sampling, ours, strict=True):
            expected = await self.whole.answer(prompt, params)
            assert answer.record.route is not None
            assert answer.record.route.mode is Mode.DISAGGREGATED
            assert answer.token_ids == expected.token_ids
            assert answer.logprobs == expected.logprobs
            assert answer.finish_reason is expected.finish_reason
        await self.split.until_idle()

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")
    opened = Pair(checkpoint)
    yield opened
    opened.close()


TOKEN = st.integers(0, VOCAB_SIZE - 1)
STEMS = [[(7 * i + 3 * k) % VOCAB_SIZE for i in range(96)] for k in range(3)]
"""Common beginnings, so that prompts meet each other's KV in both prefix caches."""

PROMPT = st.builds(
    lambda stem, length, tail: (STEMS[stem][:length] + tail) or [1],
    stem=st.integers(0, len(STEMS) - 1),
    length=st.integers(0, 96),
    tail=st.lists(TOKEN, max_size=20),
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(4, 10),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(TOKEN, max_size=40).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.booleans(),
)


@pytest.mark.timeout(600)
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(asks=st.lists(st.tuples(PROMPT, SAMPLING), min_size=1, max_size=3))
def test_same_bytes(pair: Pair, asks: list[tuple[list[int], SamplingParams]]) -> None:
    pair.compare([prompt for prompt, _ in asks], [sampling for _, sampling in asks])
