"""Real processes: an engine whose ranks are spread over hosts, which its launcher starts with it, says what any other
says, also when a host is killed in the midst of an answer."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve import RequestOutput, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.contract.processes import descendants, is_gone
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask, ask_all, expected

pytestmark = pytest.mark.timeout(240)

ASKS = [
    Ask(
        tuple((17 * i + 3 * length) % VOCAB_SIZE for i in range(length)),
        SamplingParams(temperature=0, seed=length, max_tokens=64, ignore_eos=True, logprobs=True),
    )
    for length in (40, 150)
]
LASTING = replace(ASKS[0], sampling=replace(ASKS[0].sampling, max_tokens=600))
"""Still under way when its client has seen the first token and a process is killed of it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[RequestOutput]:
    return expected(checkpoint, ASKS)


@pytest.fixture(scope="module", params=["process", pytest.param("ray", marks=pytest.mark.slow)])
def deployment(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("hosts")
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"num_blocks": 256},
        "routing": {"decode_local_below": 0},
        "pools": {"decode": {"tensor_parallel": 2, "hosts": 2}},
    }
    config = str(write_config(folder / "cluster.yaml", settings))
    with deployed(folder / "serve.log", config, "--launcher", request.param) as running:
        yield running


def check(streams: list[Stream], wanted: list[RequestOutput]) -> None:
    for stream, answer in zip(streams, wanted, strict=True):
        assert (stream.error, stream.text) == (None, answer.text)
        assert stream.logprobs == pytest.approx(answer.logprobs, abs=1e-3)


def rank_host(deployment: Deployment) -> int:
    """The process that has the decode engine's other rank."""
    (pid,) = [pid for pid in deployment.children() if b"pdserve.launch.rank_host" in _command(pid)]
    return pid


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_engine_on_two_hosts_says_what_one_says(deployment: Deployment, wanted: list[RequestOutput]) -> None:
    assert len(descendants(deployment.engines()["decode-0"]["pid"])) == 1
    assert len(descendants(rank_host(deployment))) == 1
    with ThreadPoolExecutor(len(ASKS)) as clients:
        check([future.result() for future in ask_all(deployment, ASKS, clients)], wanted)


def test_a_host_killed_amid_an_answer_ends_its_engine_and_the_answer_goes_on_elsewhere(
    deployment: Deployment, checkpoint: Path, wanted: list[RequestOutput]
) -> None:
    whole = expected(checkpoint, [LASTING])
    deployment.eventually(deployment.is_ready)
    engine, host = deployment.engines()["decode-0"], rank_host(deployment)
    processes = [host, *descendants(host), engine["pid"], *descendants(engine["pid"])]
    stream = ask(deployment, LASTING, on_begin=lambda: os.kill(host, signal.SIGKILL))
    check([stream], whole)
    assert stream.record["failed_attempts"]
    assert all(is_gone(pid, 10) for pid in processes)

    def is_back() -> bool:
        again = deployment.engines()["decode-0"]
        return bool(again["state"] == "ready" and again["epoch"] != engine["epoch"])

    deployment.eventually(is_back, within=60)
    check([ask(deployment, ASKS[1])], wanted[1:])


def test_a_drain_ends_hosts_with_their_engine(deployment: Deployment) -> None:
    deployment.eventually(deployment.is_ready)
    processes = deployment.children()
    deployment.signal(signal.SIGTERM)
    assert deployment.wait() == 0
    assert all(is_gone(pid, 5) for pid in processes)
    assert "follower" not in deployment.log.read_text(encoding="utf-8").split("draining")[-1]
