"""kill -9 of the only engine of a pool: the other pool takes over. Without that, every waiting client hears of it
within 4 s. The engine returns under a new epoch either way."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdserve import SamplingParams
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask_all, expected
from tests.strikes import order_strike

CLIENTS = 6
VERDICT_WITHIN = 4.0


@dataclass(frozen=True)
class Running:
    deployment: Deployment
    failpoints: Path


Open = Callable[..., AbstractContextManager[Running]]


def make_asks(salt: int) -> list[Ask]:
    """Long prompts nobody has asked before; salt tells one test's from another's."""
    greedy = SamplingParams(temperature=0.0, seed=0, max_tokens=300, ignore_eos=True, logprobs=True)
    return [Ask(tuple((17 * i + 5 * salt + n) % VOCAB_SIZE for i in range(1600)), greedy) for n in range(CLIENTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def open_with(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    @contextmanager
    def opened(**settings: Any) -> Iterator[Running]:
        folder = tmp_path_factory.mktemp("deployment")
        failpoints = folder / "failpoints"
        failpoints.mkdir()
        defaults = {
            "model": str(checkpoint),
            "device": "cpu",
            "kv": {"num_blocks": 1024},
            "pools": {"prefill": {"chunk_size": 16, "max_tokens_per_step": 16}},
        }
        config = write_config(folder / "cluster.yaml", defaults | settings)
        with deployed(folder / "serve.log", str(config), env={ENVIRONMENT: str(failpoints)}) as deployment:
            yield Running(deployment, failpoints)

    return opened


@pytest.fixture(scope="module")
def with_fallback(open_with: Open) -> Iterator[Running]:
    with open_with() as deployment:
        yield deployment


@pytest.fixture(scope="module")
def without_fallback(open_with: Open) -> Iterator[Running]:
    with open_with(routing={"fallback": False}, replay={"patience": 0.5}) as deployment:
        yield deployment


def strike(running: Running, victim: str, blow: str, asks: list[Ask]) -> tuple[float, list[Stream]]:
    """Hit an engine in the midst of its work; returns when (monotonic), and what the clients saw."""
    deployment = running.deployment
    deployment.eventually(deployment.is_ready)
    before = deployment.engines()[victim]
    point = "prefilling" if victim.startswith("prefill") else "decoding"
    order = order_strike(running.failpoints, victim, point, blow)
    with ThreadPoolExecutor(CLIENTS) as clients:
        waiting = ask_all(deployment, asks, clients)
        deployment.eventually(lambda: not order.exists())
        struck = time.monotonic()
        streams = [future.result() for future in waiting]

    def is_back() -> bool:
        now = deployment.engines()[victim]
        return bool(now["state"] == "ready" and now["epoch"] != before["epoch"])

    deployment.eventually(is_back)
    deployment.eventually(lambda: all_free(deployment), within=15)
    return struck, streams


def all_free(deployment: Deployment) -> bool:
    return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_the_other_pool_takes_over_with_the_same_tokens(checkpoint: Path, with_fallback: Running, victim: str) -> None:
    asks = make_asks(salt=1 if victim == "prefill-0" else 2)
    _, streams = strike(with_fallback, victim, "kill", asks)
    wrong = [
        w for stream, wanted in zip(streams, expected(checkpoint, asks), strict=True) if (w := stream.wrong(wanted))
    ]
    assert not wrong
    assert any(stream.record["failed_attempts"] for stream in streams)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("victim", "blow"),
    [
        ("prefill-0", "kill"),
        pytest.param("decode-0", "kill", marks=pytest.mark.slow),
        pytest.param("decode-0", "stop", marks=pytest.mark.slow),
    ],
)
def test_without_fallback_every_waiting_client_gets_a_clear_error_in_time(
    without_fallback: Running, victim: str, blow: str
) -> None:
    struck, streams = strike(without_fallback, victim, blow, make_asks(salt=3))
    errors = [stream for stream in streams if stream.error]
    assert errors, "nobody was waiting for the engine that was lost"
    for stream in errors:
        assert stream.error
        assert stream.ended - struck < VERDICT_WITHIN
        assert stream.error["code"] in ("engine_died", "unavailable", "transfer_failed", "link_lost")
        assert "prefill" in stream.error["message"] or "decode" in stream.error["message"]
