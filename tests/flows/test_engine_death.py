"""kill -9 of the only engine of a pool: the other pool takes over. Without that, every waiting client hears of it
within 4 s. The engine returns under a new epoch either way."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdserve import SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask_all, expected

CLIENTS = 6
VERDICT_WITHIN = 4.0
Open = Callable[..., AbstractContextManager[Deployment]]


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
    def opened(**settings: Any) -> Iterator[Deployment]:
        folder = tmp_path_factory.mktemp("deployment")
        defaults = {
            "model": str(checkpoint),
            "device": "cpu",
            "kv": {"num_blocks": 1024},
            # Small chunks keep prompts in prefill long enough to be met there.
            "pools": {"prefill": {"chunk_size": 16, "max_tokens_per_step": 16}},
        }
        with deployed(
            folder / "serve.log", str(write_config(folder / "cluster.yaml", defaults | settings))
        ) as deployment:
            yield deployment

    return opened


@pytest.fixture(scope="module")
def with_fallback(open_with: Open) -> Iterator[Deployment]:
    with open_with() as deployment:
        yield deployment


@pytest.fixture(scope="module")
def without_fallback(open_with: Open) -> Iterator[Deployment]:
    with open_with(routing={"fallback": False}, replay={"patience": 0.5}) as deployment:
        yield deployment


def strike(deployment: Deployment, victim: str, blow: str, asks: list[Ask]) -> tuple[float, list[Stream]]:
    """Hit an engine while all clients wait; returns when (monotonic), and what the clients saw."""
    deployment.eventually(deployment.is_ready)
    before = deployment.engines()[victim]
    with ThreadPoolExecutor(CLIENTS) as clients:
        waiting = ask_all(deployment, asks, clients)
        deployment.eventually(lambda: busy(deployment, victim))
        struck = time.monotonic()
        os.kill(before["pid"], signal.Signals[f"SIG{blow}"])
        streams = [future.result() for future in waiting]

    def is_back() -> bool:
        now = deployment.engines()[victim]
        return bool(now["state"] == "ready" and now["epoch"] != before["epoch"])

    deployment.eventually(is_back)
    deployment.eventually(lambda: all_free(deployment), within=15)
    return struck, streams


def busy(deployment: Deployment, victim: str) -> bool:
    engine = deployment.engines()[victim]
    return bool(
        engine["running"] + engine["waiting"] > 0 and engine["kv_blocks"]["used"] + engine["kv_blocks"]["leased"] > 0
    )


def all_free(deployment: Deployment) -> bool:
    return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in deployment.engines().values())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_the_other_pool_takes_over_with_the_same_tokens(
    checkpoint: Path, with_fallback: Deployment, victim: str
) -> None:
    asks = make_asks(salt=1 if victim == "prefill-0" else 2)
    _, streams = strike(with_fallback, victim, "KILL", asks)
    wrong = [
        w for stream, wanted in zip(streams, expected(checkpoint, asks), strict=True) if (w := stream.wrong(wanted))
    ]
    assert not wrong
    assert any(stream.record["failed_attempts"] for stream in streams)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("victim", "blow"), [("prefill-0", "KILL"), ("decode-0", "KILL"), ("decode-0", "STOP")])
def test_without_fallback_every_waiting_client_gets_a_clear_error_in_time(
    without_fallback: Deployment, victim: str, blow: str
) -> None:
    struck, streams = strike(without_fallback, victim, blow, make_asks(salt=3))
    errors = [stream for stream in streams if stream.error]
    assert errors, "nobody was waiting for the engine that was lost"
    for stream in errors:
        assert stream.error
        assert stream.ended - struck < VERDICT_WITHIN
        assert stream.error["code"] in ("engine_died", "unavailable", "transfer_failed", "link_lost")
        assert "prefill" in stream.error["message"] or "decode" in stream.error["message"]
