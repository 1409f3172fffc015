"""Real processes: prefill and decode engines of different numbers of ranks say what one engine of one rank says, also
when a rank is killed in the midst of an answer."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve import RequestOutput, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask, ask_all, expected

Cell = tuple[int, int, int]
CELLS: tuple[Cell, ...] = ((1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 2, 2))
"""Ranks of the prefill and of the decode engine, key heads of the model."""
QUICK = CELLS[0]


def make_ask(length: int, **sampling: float) -> Ask:
    prompt = tuple((13 * i + 7 * length) % VOCAB_SIZE for i in range(length))
    settings = {"temperature": 0.0, **sampling}
    return Ask(prompt, SamplingParams(seed=length, max_tokens=64, ignore_eos=True, logprobs=True, **settings))  # type: ignore[arg-type]


ASKS = [make_ask(50), make_ask(120, temperature=0.8), make_ask(333, temperature=1.1, top_p=0.9)]
LASTING = [replace(one, sampling=replace(one.sampling, max_tokens=600)) for one in ASKS]
"""Still under way when a client has seen the first token and something is killed of it."""


@pytest.fixture(
    scope="module", params=[pytest.param(c, marks=[] if c == QUICK else [pytest.mark.slow]) for c in CELLS], ids=str
)
def cell(request: pytest.FixtureRequest) -> Cell:
    chosen: Cell = request.param
    return chosen


@pytest.fixture(scope="module")
def checkpoint(cell: Cell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", num_key_value_heads=cell[2])


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[RequestOutput]:
    return expected(checkpoint, ASKS)


@pytest.fixture(scope="module")
def deployment(cell: Cell, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("ranks")
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"num_blocks": 256},
        "routing": {"decode_local_below": 0},
        "pools": {
            # Small steps, so that computing a history takes longer than fetching it wherever this runs.
            "prefill": {"tensor_parallel": cell[0], "chunk_size": 32, "max_tokens_per_step": 32},
            "decode": {"tensor_parallel": cell[1]},
        },
    }
    with deployed(folder / "serve.log", str(write_config(folder / "cluster.yaml", settings))) as running:
        yield running


def difference(stream: Stream, wanted: RequestOutput) -> str:
    """How the answer differs from the wanted one in more than the last bits of its probabilities."""
    if stream.error or stream.text != wanted.text:
        return f"said {stream.text!r} and {stream.error} instead of {wanted.text!r}"
    close = stream.logprobs == pytest.approx(wanted.logprobs, abs=1e-3)
    return "" if close else f"its probabilities are {stream.logprobs} instead of {wanted.logprobs}"


def all_free(deployment: Deployment) -> bool:
    return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())


def ranks_of(deployment: Deployment, engine_id: str) -> list[int]:
    """Process ids of an engine's ranks; with one rank, the engine's own."""
    pid = deployment.engines()[engine_id]["pid"]
    return descendants(pid) or [pid]


@pytest.mark.timeout(240)
def test_an_answer_is_the_same_however_many_ranks_prefill_and_decode_it(
    deployment: Deployment, wanted: list[RequestOutput], cell: Cell
) -> None:
    assert [len(ranks_of(deployment, f"{role}-0")) for role in ("prefill", "decode")] == list(cell[:2])
    with ThreadPoolExecutor(len(ASKS)) as clients:
        streams = [future.result() for future in ask_all(deployment, ASKS, clients)]
    for stream, answer in zip(streams, wanted, strict=True):
        assert not difference(stream, answer)
        assert stream.record["mode"] == "disaggregated"
    deployment.eventually(lambda: all_free(deployment))


@pytest.mark.timeout(240)
def test_a_history_is_fetched_back_however_many_ranks_hold_it(deployment: Deployment, checkpoint: Path) -> None:
    first = Ask(ASKS[0].prompt, replace(ASKS[0].sampling, max_tokens=600))
    (said,) = expected(checkpoint, [first])
    second = Ask(first.prompt + said.token_ids + ASKS[1].prompt, ASKS[1].sampling)
    streams = [ask(deployment, first), ask(deployment, second)]
    for stream, answer in zip(streams, [said, *expected(checkpoint, [second])], strict=True):
        assert not difference(stream, answer)
    fetch = streams[1].record["fetch"]
    assert (fetch["source"], fetch["error"]) == ("decode-0", "")
    assert fetch["tokens"] >= 592
    deployment.eventually(lambda: all_free(deployment))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [pytest.param("prefill-0", marks=pytest.mark.slow), "decode-0"])
def test_a_rank_killed_amid_an_answer_ends_its_engine_and_the_answer_goes_on_elsewhere(
    deployment: Deployment, checkpoint: Path, victim: str
) -> None:
    wanted = expected(checkpoint, LASTING)
    deployment.eventually(deployment.is_ready)
    before = deployment.engines()[victim]["epoch"]
    kill = once(lambda: os.kill(ranks_of(deployment, victim)[-1], signal.SIGKILL))
    with ThreadPoolExecutor(len(LASTING)) as clients:
        futures = [clients.submit(ask, deployment, one, on_begin=kill) for one in LASTING]
        streams = [future.result() for future in futures]
    assert not [problem for s, answer in zip(streams, wanted, strict=True) if (problem := difference(s, answer))]
    assert victim.startswith("prefill") or any(stream.record["failed_attempts"] for stream in streams)

    def is_back() -> bool:
        engine = deployment.engines()[victim]
        return bool(engine["state"] == "ready" and engine["epoch"] != before)

    deployment.eventually(is_back, within=60)
    deployment.eventually(lambda: all_free(deployment))


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Acts when first called."""
    left = [act]

    def called() -> None:
        if left:
            left.pop()()

    return called
