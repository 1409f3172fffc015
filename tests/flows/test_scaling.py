"""A running deployment grows, shrinks and changes an engine's role while streams run; nobody loses a token."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from pdserve.cli.app import app
from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.flows.test_drain import make_asks
from tests.streams import Ask, Stream, ask_all, expected

STREAMS = 8
FIXED: dict[str, Any] = {"min": 1, "max": 4, "forecast": {"kind": "none"}, "down": {"cooldown": 0, "window": 0}}
QUIET: dict[str, Any] = {"targets": {"slo": None, "backlog_seconds": None, "kv_occupancy": None, "queue": None}}


def policies(path: Path, **changes: Any) -> Path:
    """A policy without signals, so that bounds alone decide, and what is changed in it."""
    pools = {role: {**FIXED, **QUIET, **changes.pop(role, {})} for role in ("prefill", "decode")}
    replacement = path.with_suffix(".new")
    write_config(replacement, {"interval": 0.5, "window": 5, "bypass": {"enabled": False}, "pools": pools, **changes})
    replacement.replace(path)
    return path


@dataclass(frozen=True)
class Running:
    deployment: Deployment
    policies: Path
    checkpoint: Path

    def states(self, role: str) -> dict[str, str]:
        return {e["id"]: e["state"] for e in self.deployment.engines().values() if e["role"] == role}

    def ready(self, role: str) -> list[str]:
        return [engine_id for engine_id, state in self.states(role).items() if state == "ready"]

    def explanation(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.deployment.admin_url}/admin/scaling", timeout=10).json()
        return answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("scaling")
    checkpoint = make_checkpoint(folder / "qwen3", "qwen3", num_hidden_layers=12)
    path = policies(folder / "policies.yaml")
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"num_blocks": 4096},
        "policies": str(path),
        "routing": {"decode_local_below": 0},
    }
    with deployed(folder / "serve.log", str(write_config(folder / "cluster.yaml", settings))) as deployment:
        yield Running(deployment, path, checkpoint)


def metrics(running: Running) -> str:
    return httpx.get(f"{running.deployment.admin_url}/metrics", timeout=10).text


def streaming(running: Running, asks: list[Ask], clients: ThreadPoolExecutor) -> "list[Future[Stream]]":
    """Once all of them decode."""
    streams = ask_all(running.deployment, asks, clients)
    running.deployment.eventually(
        lambda: sum(e["running"] for e in running.deployment.engines().values()) == len(asks), within=60
    )
    return streams


def judge(running: Running, asks: list[Ask], streams: "list[Future[Stream]]") -> None:
    done = [stream.result() for stream in streams]
    wanted = expected(running.checkpoint, asks)
    assert not [text for stream, output in zip(done, wanted, strict=True) if (text := stream.wrong(output))]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_pool_grows_and_shrinks_under_streams_as_the_changed_policy_says(running: Running) -> None:
    asks = make_asks(salt=5, count=STREAMS, max_tokens=1200)
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = streaming(running, asks, clients)
        policies(running.policies, decode={"min": 3})
        running.deployment.eventually(lambda: len(running.ready("decode")) == 3, within=60)
        policies(running.policies, decode={"max": 1})
        running.deployment.eventually(lambda: len(running.ready("decode")) == 1, within=60)
        judge(running, asks, streams)
    running.deployment.eventually(lambda: sorted(running.states("decode").values()) == ["dead", "dead", "ready"])
    decisions = [decision["what"] for decision in running.explanation()["decisions"]]
    assert decisions[:2] == ["decode from 1 to 3 engines", "decode from 3 to 1 engines"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_engine_takes_the_other_role_within_two_seconds_and_its_streams_go_on(running: Running) -> None:
    asks = make_asks(salt=6, count=STREAMS, max_tokens=1200)
    policies(running.policies, decode={"min": 2})
    running.deployment.eventually(lambda: len(running.ready("decode")) == 2, within=60)
    epochs = {e["id"]: e["epoch"] for e in running.deployment.engines().values()}
    with ThreadPoolExecutor(STREAMS) as clients:
        streams = streaming(running, asks, clients)
        flip = {"enabled": True, "cooldown": 0, "spare_for": 0}
        asked = time.time()
        policies(running.policies, prefill={"min": 2}, decode={"max": 1}, flip=flip)
        running.deployment.eventually(lambda: len(running.ready("prefill")) == 2, within=30)
        flips = [d for d in running.explanation()["decisions"] if d["speed"] == "flip"]
        took = time.time() - max(asked, flips[-1]["at"])
        judge(running, asks, streams)
    assert len(flips) == 1
    after = running.deployment.engines()
    assert {name: after[name]["epoch"] for name in epochs} == epochs
    assert took < 2.0, f"the role was seen changed {took:.1f} s after it was decided"
    assert running.deployment.complete("after the flip").status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_sleeps_wakes_for_a_request(running: Running) -> None:
    asleep = {"min": 0, "max": 1}
    policies(running.policies, prefill=asleep, decode=asleep, scale_to_zero={"idle": 1.0, "patience": 60.0})
    running.deployment.eventually(lambda: not running.ready("prefill") and not running.ready("decode"), within=60)
    running.deployment.eventually(running.deployment.is_ready)  # asleep, and still where requests are to go
    assert not running.ready("prefill") + running.ready("decode")
    assert running.deployment.complete("wake up").status_code == 200
    rules = {decision["rule"] for decision in running.explanation()["decisions"]}
    assert {"sleep", "wake"} <= rules


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_wrong_policy_is_refused_and_the_one_before_stays(running: Running) -> None:
    policies(running.policies)
    running.deployment.eventually(lambda: running.explanation()["refusal"] == "" and running.ready("decode") != [])
    policies(running.policies, decode={"min": 9})
    running.deployment.eventually(
        lambda: "pools.decode.max: must not be less than min (9)" in running.explanation()["refusal"]
    )
    assert running.explanation()["pools"][1]["wanted"] <= 4
    result = CliRunner().invoke(app, ["policy", "explain", "--port", running.deployment.address.rpartition(":")[2]])
    assert "is refused" in result.output
    refused = 'pdserve_scaler_policy_reloads_total{result="refused"} 1.0'
    running.deployment.eventually(lambda: refused in metrics(running))
    assert 'pdserve_scaler_engines{kind="wanted",role="decode"}' in metrics(running)
