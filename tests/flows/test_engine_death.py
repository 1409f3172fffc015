"""kill -9 of an engine: every waiting client hears of it within 4 s, and the engine returns under a new epoch."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config

CLIENTS = 6
VERDICT_WITHIN = 4.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    settings = {
        "model": str(make_checkpoint(folder / "model", "qwen3", num_hidden_layers=8)),
        "device": "cpu",
        "kv": {"num_blocks": 1024},
        # Small chunks keep prompts in prefill long enough to be met there.
        "pools": {"prefill": {"chunk_size": 16, "max_tokens_per_step": 16}},
    }
    with deployed(folder / "serve.log", str(write_config(folder / "cluster.yaml", settings))) as deployment:
        yield deployment


def _ask(deployment: Deployment, client: int) -> tuple[float, dict[str, Any]]:
    """One long streamed answer; returns when it ended (monotonic) and its last data."""
    prompt = [(17 * i + client) % VOCAB_SIZE for i in range(900)]
    body = {"prompt": prompt, "max_tokens": 1000, "ignore_eos": True, "temperature": 0, "stream": True}
    last: dict[str, Any] = {}
    with httpx.stream("POST", f"{deployment.url}/v1/completions", json=body, timeout=60) as response:
        if response.status_code != 200:
            response.read()
            return time.monotonic(), response.json()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
    return time.monotonic(), last


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("victim", "blow"), [("prefill-0", "KILL"), ("decode-0", "KILL"), ("decode-0", "STOP")])
def test_every_waiting_client_gets_a_clear_error_in_time(running: Deployment, victim: str, blow: str) -> None:
    running.eventually(running.is_ready)
    before = running.engines()
    with ThreadPoolExecutor(CLIENTS) as clients:
        waiting = [clients.submit(_ask, running, client) for client in range(CLIENTS)]
        running.eventually(lambda: running.engines()[victim]["running"] + running.engines()[victim]["waiting"] > 0)
        running.eventually(lambda: any(e["kv_blocks"]["used"] > 0 for e in running.engines().values()))
        struck = time.monotonic()
        os.kill(before[victim]["pid"], signal.Signals[f"SIG{blow}"])
        verdicts = [future.result() for future in waiting]
    errors = [(ended - struck, answer["error"]) for ended, answer in verdicts if "error" in answer]
    assert errors, "nobody was waiting for the engine that was lost"
    for seconds, error in errors:
        assert seconds < VERDICT_WITHIN
        assert error["code"] in ("engine_died", "unavailable", "transfer_failed")
        assert "prefill" in error["message"] or "decode" in error["message"]

    def is_back() -> bool:
        now = running.engines()[victim]
        return bool(now["state"] == "ready" and now["epoch"] != before[victim]["epoch"])

    running.eventually(is_back)
    running.eventually(running.is_ready)
    assert running.complete([1] * 50, max_tokens=3).status_code == 200

    def all_free() -> bool:
        return all(e["kv_blocks"]["free"] == e["kv_blocks"]["total"] for e in running.engines().values())

    running.eventually(all_free, within=15)
