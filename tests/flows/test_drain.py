"""`pdserve drain` over real processes: an engine is emptied and restarted while streams run, and no client notices,
whatever dies meanwhile."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from pdserve import SamplingParams
from pdserve.cli.app import app
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, begin_all, expected
from tests.strikes import order_strike

STREAMS = 16


@dataclass(frozen=True)
class Running:
    deployment: Deployment
    failpoints: Path
    checkpoint: Path


def make_asks(salt: int, count: int = STREAMS, max_tokens: int = 500) -> list[Ask]:
    """Greedy and drawn, with and without penalties, short and long; salt tells one test's from another's."""
    return [
        Ask(
            prompt=tuple((17 * i + 31 * salt + 7 * n) % VOCAB_SIZE for i in range(60 + 40 * n)),
            sampling=SamplingParams(
                temperature=(0.0, 0.9, 1.2)[n % 3],
                top_p=(1.0, 0.9)[n % 2],
                repetition_penalty=(1.0, 1.2)[n // 2 % 2],
                seed=n,
                max_tokens=max_tokens,
                ignore_eos=True,
                logprobs=True,
            ),
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("deployment")
    failpoints = folder / "failpoints"
    failpoints.mkdir()
    checkpoint = make_checkpoint(folder / "qwen3", "qwen3", num_hidden_layers=24)
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"num_blocks": 4096},
        "pools": {"decode": {"engines": 2}},
        "times": {"restart_backoff": 0.2},
    }
    config = write_config(folder / "cluster.yaml", settings)
    with deployed(folder / "serve.log", str(config), env={ENVIRONMENT: str(failpoints)}) as deployment:
        yield Running(deployment, failpoints, checkpoint)


def all_free(deployment: Deployment) -> bool:
    return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())


def all_ready(deployment: Deployment) -> bool:
    return deployment.is_ready() and all(e["state"] == "ready" for e in deployment.engines().values())


def start_streams(running: Running, asks: list[Ask], clients: ThreadPoolExecutor) -> "list[Future[Stream]]":
    """Until all of them have begun, some of them on decode-0."""
    deployment = running.deployment
    deployment.eventually(lambda: all_ready(deployment))
    streams = begin_all(deployment, asks, clients)
    deployment.eventually(lambda: deployment.engines()["decode-0"]["running"] > 0)
    return streams


def judge(running: Running, asks: list[Ask], streams: "list[Future[Stream]]") -> list[Stream]:
    """Everybody got exactly what an undisturbed engine says, and nothing is left behind."""
    done = [stream.result() for stream in streams]
    wanted = expected(running.checkpoint, asks)
    wrong = [text for stream, output in zip(done, wanted, strict=True) if (text := stream.wrong(output))]
    assert not wrong
    running.deployment.eventually(lambda: all_ready(running.deployment))
    running.deployment.eventually(lambda: all_free(running.deployment), within=20)
    return done


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_drained_engine_restarts_and_its_sixteen_streams_go_on_elsewhere(running: Running) -> None:
    deployment, asks = running.deployment, make_asks(salt=1, max_tokens=1200)
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = start_streams(running, asks, clients)
        before = deployment.engines()["decode-0"]
        port = deployment.address.rpartition(":")[2]
        result = CliRunner().invoke(app, ["drain", "decode-0", "--port", port])
        assert "it starts again" in result.output
        done = judge(running, asks, streams)
    moves = [move for stream in done for move in stream.record["migrations"]]
    assert moves, "the engine waited for its streams instead of moving them"
    assert {(move["from"], move["to"], move["outcome"]) for move in moves} == {("decode-0", "decode-1", "ok")}
    assert not any(stream.record["failed_attempts"] for stream in done)
    assert deployment.engines()["decode-0"]["epoch"] != before["epoch"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_engine_that_is_told_to_end_by_its_machine_loses_nothing(running: Running) -> None:
    """As when a spot instance is taken away: nobody but the engine knows."""
    deployment, asks = running.deployment, make_asks(salt=40, count=6, max_tokens=1700)
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = start_streams(running, asks, clients)
        before = deployment.engines()["decode-0"]
        os.kill(before["pid"], signal.SIGTERM)
        deployment.eventually(lambda: deployment.engines()["decode-0"]["epoch"] != before["epoch"])
        done = judge(running, asks, streams)
    assert any(stream.record["migrations"] for stream in done)
    assert not any(stream.record["failed_attempts"] for stream in done)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("victim", "point", "salt"),
    [
        ("decode-0", "departing", 51),
        ("decode-0", "stopped", 52),
        ("decode-1", "transferring", 53),
        ("decode-1", "caught_up", 54),
    ],
)
def test_an_engine_that_dies_in_the_midst_of_a_migration_costs_nobody_a_token(
    running: Running, victim: str, point: str, salt: int
) -> None:
    deployment, asks = running.deployment, make_asks(salt=salt, count=6, max_tokens=1700)
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = start_streams(running, asks, clients)
        order = order_strike(running.failpoints, victim, point, "kill")
        httpx.post(f"{deployment.admin_url}/admin/engines/decode-0/restart").raise_for_status()
        deployment.eventually(lambda: not order.exists())
        judge(running, asks, streams)


def test_an_engine_that_was_drained_to_stay_away_returns_when_asked_to(running: Running) -> None:
    deployment = running.deployment
    deployment.eventually(lambda: all_ready(deployment))
    port = deployment.address.rpartition(":")[2]
    assert "it stays away" in CliRunner().invoke(app, ["drain", "decode-1", "--stay-away", "--port", port]).output
    assert deployment.engines()["decode-1"]["state"] == "dead"
    assert deployment.complete("still served").status_code == 200
    assert "decode-1 starts" in CliRunner().invoke(app, ["start", "decode-1", "--port", port]).output
    deployment.eventually(lambda: all_ready(deployment))
    before = deployment.engines()["decode-1"]["epoch"]
    assert "runs already" in CliRunner().invoke(app, ["start", "decode-1", "--port", port]).output
    assert deployment.engines()["decode-1"]["epoch"] == before


def test_an_order_for_an_engine_there_is_not_is_refused(running: Running) -> None:
    answer = httpx.post(f"{running.deployment.admin_url}/admin/engines/decode-7/restart")
    assert answer.status_code == 400
    assert "decode-7" in answer.json()["error"]["message"]
