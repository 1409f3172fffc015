"""`pdserve serve --workers 2` in real processes: one server to its clients, whichever process dies."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from pdserve import RequestOutput, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import Deployment, deployed, write_config
from tests.flows.test_several_routers import metric
from tests.streams import Ask, Stream, ask, begin_all, expected

pytestmark = pytest.mark.slow

STREAMS = 12
MANY, FEW = "key-of-many-0000000", "key-of-few-00000000"
LIMIT = 2
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=150, ignore_eos=True, logprobs=True)
ASKS = [Ask(tuple((7 * number + token) % 250 for token in range(64)), GREEDY) for number in range(STREAMS)]

LONGER = 800
LONG = [replace(one, sampling=replace(GREEDY, max_tokens=LONGER)) for one in ASKS]


@dataclass(frozen=True)
class Served:
    deployment: Deployment
    wanted: list[RequestOutput]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=12)
    tenants = [
        {"name": "many", "keys": [digest(MANY)]},
        {"name": "few", "keys": [digest(FEW)], "concurrent_requests": LIMIT},
    ]
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "kv": {"memory": "8MiB"},
        "tenants": tenants,
        "admission": {"enabled": False},
    }
    logs = tmp_path_factory.mktemp("log")
    config = str(write_config(logs / "cluster.yaml", settings))
    with deployed(logs / "serve.log", config, "--workers", "2") as deployment:
        yield Served(deployment, expected(checkpoint, ASKS))


def digest(key: str) -> str:
    return f"sha256:{sha256(key.encode()).hexdigest()}"


def processes(deployment: Deployment, module: str) -> set[int]:
    """Process ids of the deployment's processes of a kind."""
    return {
        pid
        for pid in descendants(deployment.process.pid)
        if f"pdserve.launch.{module}" in Path(f"/proc/{pid}/cmdline").read_text()
    }


def finished(streams: "list[Future[Stream]]") -> list[Stream | None]:
    """None for those whose connection broke."""
    return [None if isinstance(one.exception(), httpx.TransportError) else one.result() for one in streams]


def test_both_processes_serve_and_say_what_one_engine_alone_says(served: Served) -> None:
    deployment = served.deployment
    assert len(processes(deployment, "front")) == 2
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = begin_all(deployment, ASKS, pool, api_key=MANY)
        assert [one.result().wrong(wanted) for one, wanted in zip(streams, served.wanted, strict=True)] == [
            ""
        ] * STREAMS
    log = deployment.log.read_text(encoding="utf-8")
    assert all(
        any(f"[front-{number}]" in line and " request " in line for line in log.splitlines()) for number in (0, 1)
    )
    counted = 'pdserve_requests_total{endpoint="completions",status="ok"}'
    assert metric(deployment, counted) == STREAMS
    assert metric(deployment, "pdserve_output_tokens") == STREAMS * GREEDY.max_tokens
    assert metric(deployment, "pdserve_time_to_first_token_seconds_count") == STREAMS


def test_a_tenants_limit_holds_over_both(served: Served) -> None:
    with ThreadPoolExecutor(STREAMS) as pool:
        allowed = begin_all(served.deployment, LONG[:LIMIT], pool, api_key=FEW)
        refused = [pool.submit(ask, served.deployment, one, api_key=FEW) for one in ASKS[LIMIT:]]
        codes = {(one.result().error or {}).get("code") for one in refused}
        assert not any(one.done() for one in allowed), "they were to be in the way of the others"
        assert codes == {"rate_limit_exceeded"}
        assert all(one.result().error is None for one in allowed)


def test_a_key_is_executed_once_whichever_process_is_asked(served: Served) -> None:
    body = ASKS[0].body() | {"stream": False}
    headers = {"Idempotency-Key": "one for all", "Authorization": f"Bearer {MANY}"}

    def once(_: int) -> str:
        answer = httpx.post(f"{served.deployment.url}/v1/completions", json=body, headers=headers, timeout=60)
        return str(answer.json()["id"])

    with ThreadPoolExecutor(STREAMS) as pool:
        assert len(set(pool.map(once, range(STREAMS)))) == 1


def test_a_killed_front_takes_its_own_streams_along_and_nothing_else(served: Served) -> None:
    deployment = served.deployment
    before = processes(deployment, "front")
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = begin_all(deployment, LONG, pool, api_key=MANY)
        os.kill(min(before), signal.SIGKILL)
        ended = finished(streams)
    broken = [one for one in ended if one is None]
    assert 0 < len(broken) < STREAMS
    whole = [(one.error, len(one.logprobs)) for one in ended if one]
    assert whole == [(None, LONGER)] * (STREAMS - len(broken))
    pairs = [(one, wanted) for one, wanted in zip(ended, served.wanted, strict=True) if one]
    assert [tuple(one.logprobs[: GREEDY.max_tokens]) == wanted.logprobs for one, wanted in pairs] == [True] * len(pairs)
    deployment.eventually(lambda: len(processes(deployment, "front")) == 2)
    assert len(processes(deployment, "front") - before) == 1
    deployment.eventually(lambda: all(engine["running"] == 0 for engine in deployment.engines().values()))
    with ThreadPoolExecutor(STREAMS) as pool:
        again = begin_all(deployment, ASKS, pool, api_key=MANY)
        assert [one.result().wrong(wanted) for one, wanted in zip(again, served.wanted, strict=True)] == [""] * STREAMS


def test_without_the_gateway_fronts_say_so_and_serve_as_soon_as_there_is_another(served: Served) -> None:
    deployment = served.deployment
    fronts = processes(deployment, "front")
    with ThreadPoolExecutor(STREAMS) as pool:
        [gateway] = processes(deployment, "gateway")
        streams = begin_all(deployment, LONG, pool, api_key=MANY)
        os.kill(gateway, signal.SIGKILL)
        ended = [one.result() for one in streams]
        whole = [one for one in ended if one.error is None]
        assert [len(one.logprobs) for one in whole] == [LONGER] * len(whole)
        cut_off = [one.error["code"] for one in ended if one.error]
        assert set(cut_off) == {"unavailable"}
    assert httpx.get(f"{deployment.url}/ready", timeout=10).status_code == 503
    assert deployment.complete([1, 2, 3]).status_code in (401, 503)
    deployment.eventually(deployment.is_ready)
    assert processes(deployment, "front") == fronts
    assert not ask(deployment, ASKS[0], api_key=MANY).wrong(served.wanted[0])


def test_streams_finish_when_everything_is_to_end(served: Served) -> None:
    deployment = served.deployment
    deployment.eventually(lambda: all(ready(deployment) for _ in range(8)))
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = begin_all(deployment, ASKS, pool, api_key=MANY)
        deployment.signal(signal.SIGTERM)
        ended = [one.result().wrong(wanted) for one, wanted in zip(streams, served.wanted, strict=True)]
        assert ended == [""] * STREAMS
    assert deployment.wait() == 0


def ready(deployment: Deployment) -> bool:
    return httpx.get(f"{deployment.url}/ready", timeout=10).status_code == 200
