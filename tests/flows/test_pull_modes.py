"""Both ways of pulling give the same tokens, and the record says which one it was."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.request import SamplingParams
from pdserve.engine.pull_mode import PullForecast, PullHistory, PullMode
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.flows.inproc import Cluster, NodeSpec, PairsOnly, open_cluster

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=6, ignore_eos=True)
PROMPT = [(5 * i + 2) % VOCAB_SIZE for i in range(900)]
"""Long enough for pulls to begin before its prefill ends, on any machine."""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    limits = EngineLimits(chunk_size=32, prefix_caching=False)
    specs = {
        "p": NodeSpec(role=Role.PREFILL, limits=limits),
        "d": NodeSpec(role=Role.DECODE, limits=limits),
    }
    async with open_cluster(make_checkpoint(tmp_path / "llama", "llama"), specs, policy=PairsOnly()) as cluster:
        yield cluster


async def test_bulk_and_progressive_pulls_give_the_same_tokens(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await cluster.answer(PROMPT, GREEDY)
    trace = first.record.decode_trace
    assert trace is not None
    assert (trace.transfer_mode, trace.transfer_forecast) == ("progressive", ())
    assert trace.transfer_pulls > 1
    assert set(dict(trace.transfer_stages)) == {"queue", "post", "wire", "verify"}
    monkeypatch.setattr(PullHistory, "decide", lambda *_: PullForecast(PullMode.BULK, 2.0, 1.0))
    second = await cluster.answer(PROMPT, GREEDY)
    trace = second.record.decode_trace
    assert trace is not None
    assert (trace.transfer_mode, trace.transfer_pulls) == ("bulk", 1)
    assert trace.transfer_forecast == (("progressive", 2.0), ("bulk", 1.0))
    assert second.token_ids == first.token_ids
    await cluster.until_idle()
