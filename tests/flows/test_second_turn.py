"""Real processes: the second turn of a conversation fetches the first answer's KV from the decode engine that wrote it,
and the death of that engine in the midst of lending costs time, not tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pdserve import SamplingParams
from pdserve.cli.explain import render
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask, expected
from tests.strikes import order_strike

PROMPT, OUTPUT, QUESTION = 100, 300, 40
DECODES = ("decode-0", "decode-1")
SETTINGS = {
    "device": "cpu",
    "kv": {"num_blocks": 1024},
    "routing": {"decode_local_below": 0},
    # Small steps, so that computing the history takes longer than fetching it wherever this runs.
    "pools": {"prefill": {"engines": 1, "chunk_size": 16, "max_tokens_per_step": 16}, "decode": {"engines": 2}},
    "times": {"restart_backoff_max": 1.0},
}


@dataclass(frozen=True)
class Bench:
    deployment: Deployment
    failpoints: Path
    checkpoint: Path

    def turns(self, salt: int) -> list[Ask]:
        """Of a conversation of its own; the second repeats the first with its answer."""
        sampling = SamplingParams(temperature=0.8, seed=salt, max_tokens=OUTPUT, ignore_eos=True, logprobs=True)
        prompt = tuple((17 * i + 5 * salt) % VOCAB_SIZE for i in range(PROMPT))
        (said,) = expected(self.checkpoint, [Ask(prompt, sampling)])
        question = tuple((3 * i + salt) % VOCAB_SIZE for i in range(QUESTION))
        return [Ask(prompt, sampling), Ask(prompt + said.token_ids + question, sampling)]

    def talk(self, turns: list[Ask]) -> list[Stream]:
        return [ask(self.deployment, turn) for turn in turns]

    def check(self, turns: list[Ask], streams: list[Stream]) -> None:
        wrong = [s.wrong(w) for s, w in zip(streams, expected(self.checkpoint, turns), strict=True)]
        assert not any(wrong), wrong

    def all_free(self) -> bool:
        blocks = [engine["kv_blocks"] for engine in self.deployment.engines().values()]
        return len(blocks) == 3 and all(kv and kv["free"] == kv["total"] for kv in blocks)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("second_turn")
    checkpoint = make_checkpoint(folder / "model", "qwen3", num_hidden_layers=4)
    failpoints = folder / "failpoints"
    failpoints.mkdir()
    config = write_config(folder / "cluster.yaml", SETTINGS | {"model": str(checkpoint)})
    with deployed(folder / "serve.log", str(config), env={ENVIRONMENT: str(failpoints)}) as deployment:
        yield Bench(deployment, failpoints, checkpoint)


def test_the_history_is_fetched_from_the_decode_engine(bench: Bench) -> None:
    turns = bench.turns(salt=1)
    streams = bench.talk(turns)
    bench.check(turns, streams)
    first, second = (stream.record for stream in streams)
    assert first["fetch"] is None
    assert second["mode"] == "disaggregated"
    assert second["fetch"]["source"] == first["decode"]["engine"]
    held = (PROMPT + OUTPUT - 1) // 16 * 16
    here = PROMPT // 16 * 16
    assert (second["fetch"]["tokens"], second["fetch"]["error"]) == (held - here, "")
    assert second["prefill"]["cached_tokens"] == held
    explained = render(httpx.get(f"{bench.deployment.admin_url}/admin/requests/{second['request_id']}").content)
    assert f"fetch: {held} tokens of the prompt from {second['fetch']['source']}" in explained
    metrics = httpx.get(f"{bench.deployment.admin_url}/metrics").text
    assert 'pdserve_prefix_fetches_total{result="ok"} 1.0' in metrics
    bench.deployment.eventually(bench.all_free)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("blow", ["kill", "stop"])
def test_a_lender_that_is_lost_in_the_midst_costs_no_token(bench: Bench, blow: str) -> None:
    turns = bench.turns(salt={"kill": 2, "stop": 3}[blow])
    bench.deployment.eventually(bench.deployment.is_ready)
    first = bench.talk(turns[:1])
    lender = first[0].record["decode"]["engine"]
    order = order_strike(bench.failpoints, lender, "lending", blow)
    second = bench.talk(turns[1:])
    assert not order.exists(), "nobody was asked to lend"
    bench.check(turns, first + second)
    bench.deployment.eventually(bench.all_free)
