"""A decode engine whose reads never end loses its KV memory to quarantine: it drains, what runs there moves or is
replayed, and it starts again with all of its blocks, while every client gets its answer."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdserve import SamplingParams
from pdserve.core.failpoints import ENVIRONMENT
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.streams import Ask, Stream, ask, ask_all, expected
from tests.strikes import order_strike

CLIENTS = 6
LONG = 4
VICTIM = "decode-0"
SETTINGS = {
    "device": "cpu",
    "worker": "inproc",
    "admission": {"enabled": False},
    "routing": {"decode_local_below": 0, "policy": "round_robin"},
    # One prompt of 660 tokens is more than that: after the first read that is late nobody reads over its link.
    "kv": {"num_blocks": 640, "quarantine_limit": 0.05},
    "pools": {"decode": {"engines": 2, "prefix_caching": False}, "prefill": {"prefix_caching": False}},
    "times": {
        "transfer_deadline": 0.5,
        "quarantine": 4.5,
        "restart_backoff": 0.2,
        "link_backoff": 0.2,
        "link_backoff_max": 0.4,
    },
}


def make_asks(count: int, *, prompt: int, tokens: int, salt: int) -> list[Ask]:
    return [
        Ask(
            prompt=tuple((13 * i + 29 * n + salt) % VOCAB_SIZE for i in range(prompt)),
            sampling=SamplingParams(
                temperature=0.0 if n % 2 else 0.9, seed=n, max_tokens=tokens, ignore_eos=True, logprobs=True
            ),
        )
        for n in range(count)
    ]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_engine_that_loses_its_memory_to_quarantine_is_replaced_and_no_stream_is_lost(tmp_path: Path) -> None:
    failpoints = tmp_path / "failpoints"
    failpoints.mkdir()
    checkpoint = make_checkpoint(tmp_path / "qwen3", "qwen3", num_hidden_layers=32)
    config = write_config(tmp_path / "cluster.yaml", {"model": str(checkpoint), **SETTINGS})
    long, short = make_asks(LONG, prompt=330, tokens=1700, salt=1), make_asks(CLIENTS, prompt=660, tokens=12, salt=7)
    wanted = dict(zip(map(id, [*long, *short]), expected(checkpoint, [*long, *short]), strict=True))
    log = tmp_path / "serve.log"
    with (
        deployed(log, str(config), env={ENVIRONMENT: str(failpoints)}) as deployment,
        ThreadPoolExecutor(LONG + CLIENTS) as clients,
    ):
        deployment.eventually(lambda: whole(deployment))
        before = deployment.engines()[VICTIM]["epoch"]
        running = ask_all(deployment, long, clients)
        deployment.eventually(lambda: all(deployment.engines()[f"decode-{n}"]["running"] > 0 for n in (0, 1)))
        order = order_strike(failpoints, VICTIM, "landing", "hold")

        def go_on(request: Ask) -> list[Stream]:
            """Until the engine is another."""
            streams: list[Stream] = []
            while not streams or not is_another(deployment.engines().get(VICTIM), before):
                streams.append(ask(deployment, request))
            return streams

        going = [clients.submit(go_on, request) for request in short]
        done = [(request, future.result()) for request, future in zip(long, running, strict=True)]
        done += [(request, s) for request, future in zip(short, going, strict=True) for s in future.result()]
        assert not order.exists(), "no read was held"
        wrong = [text for request, stream in done if (text := stream.wrong(wanted[id(request)]))]
        assert not wrong
        deployment.eventually(lambda: whole(deployment))
        metrics = httpx.get(f"{deployment.admin_url}/metrics").text
    assert f'pdserve_quarantine_drains_total{{engine="{VICTIM}"}} 1.0' in metrics
    assert "too much KV memory in quarantine" in log.read_text(encoding="utf-8")
    moved = [move for _, stream in done for move in stream.record["migrations"] if move["from"] == VICTIM]
    replayed = [stream for _, stream in done if stream.record["failed_attempts"]]
    assert replayed, "no request met the held reads"
    assert moved, "what ran there did not move"


def is_another(engine: dict[str, Any] | None, epoch: str) -> bool:
    """Whether an incarnation after that of this epoch serves."""
    return engine is not None and engine["epoch"] != epoch and engine["state"] == "ready"


def whole(deployment: Deployment) -> bool:
    """Every engine is ready and has all of its blocks."""
    engines = deployment.engines().values()
    return len(engines) == 3 and all(
        engine["state"] == "ready" and engine["kv_blocks"]["free"] == engine["kv_blocks"]["total"] for engine in engines
    )
