"""Two routers, a Redis and the engines in processes of their own; any of them is killed under load."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest

from pdserve import RequestOutput, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.contract.processes import descendants
from tests.deployment import Deployment, deployed, write_config
from tests.redis_server import RedisServer, redis_server
from tests.streams import Ask, Stream, ask, expected

pytestmark = pytest.mark.slow

STREAMS = 4
GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=150, ignore_eos=True, logprobs=True)
ASKS = [Ask(tuple((7 * number + token) % 250 for token in range(64)), GREEDY) for number in range(STREAMS)]
LONG = Ask(tuple(range(100, 164)), replace(GREEDY, max_tokens=800))
"""It still runs when all streams have begun."""


@dataclass(frozen=True)
class Cluster:
    redis: RedisServer
    engines: Deployment
    routers: tuple[Deployment, Deployment]
    wanted: list[RequestOutput]
    wanted_long: RequestOutput


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")
    logs = tmp_path_factory.mktemp("log")
    with redis_server() as redis:
        settings = {
            "model": str(checkpoint),
            "device": "cpu",
            "kv": {"memory": "8MiB"},
            "redis": {"url": redis.url},
            "times": {"redis_answer": 5.0, "drain_timeout": 10.0},
        }
        config = str(write_config(logs / "cluster.yaml", settings))
        with (
            engines_alone(logs / "engines.log", config) as engines,
            deployed(logs / "a.log", config, "--only", "router") as a,
            deployed(logs / "b.log", config, "--only", "router") as b,
        ):
            *wanted, wanted_long = expected(checkpoint, [*ASKS, LONG])
            yield Cluster(redis, engines, (a, b), wanted, wanted_long)


def engines_alone(log: Path, config: str) -> Any:
    return deployed(log, config, "--only", "engines")


def metric(router: Deployment, name: str) -> float:
    text = httpx.get(f"{router.admin_url}/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:_total)? (\S+)$", text, re.MULTILINE))


def kill_gateway(router: Deployment) -> None:
    """As the kernel would: the supervisor beside it starts another."""
    for pid in descendants(router.process.pid):
        if "pdserve.launch.gateway" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)


def keyed(router: Deployment, key: str, request: Ask, timeout: float = 60.0) -> httpx.Response:
    body = request.body() | {"stream": False}
    headers = {"Idempotency-Key": key}
    return httpx.post(f"{router.url}/v1/completions", json=body, headers=headers, timeout=timeout)


def keyed_until_answered(router: Deployment, key: str, request: Ask) -> httpx.Response:
    """As clients do: again on 503, at once when the connection broke."""
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = keyed(router, key, request)
            if answer.status_code != 503 or time.monotonic() > deadline:
                return answer
        except httpx.TransportError:
            assert time.monotonic() < deadline
        time.sleep(0.2)


def under_load(router: Deployment, pool: ThreadPoolExecutor) -> tuple[list[Any], Barrier]:
    """Streams on a router; the barrier opens when all have begun."""
    begun = Barrier(STREAMS + 1, timeout=60)
    return [pool.submit(ask, router, request, on_begin=begun.wait) for request in ASKS], begun


def await_rebuilt(restarted: Deployment, other: Deployment) -> None:
    """Until it serves again, sees the other, and knows of as many blocks."""

    def is_rebuilt() -> bool:
        known, wanted = (metric(r, 'pdserve_kv_index_blocks{kind="announced"}') for r in (restarted, other))
        return restarted.is_ready() and metric(restarted, "pdserve_other_routers") == 1 and known == wanted > 0

    restarted.eventually(is_rebuilt)


def assert_undisturbed(streams: list[Any], wanted: list[RequestOutput]) -> None:
    for stream, right in zip(streams, wanted, strict=True):
        result: Stream = stream.result()
        assert not result.wrong(right)
        assert result.record["failed_attempts"] == []


def test_each_router_serves_with_all_engines_and_hears_of_the_other(cluster: Cluster) -> None:
    for router in cluster.routers:
        assert set(router.engines()) == {"prefill-0", "decode-0"}
        assert not ask(router, ASKS[0]).wrong(cluster.wanted[0])
        router.eventually(lambda router=router: metric(router, "pdserve_other_routers") == 1)  # type: ignore[misc]


def test_a_retry_at_the_other_router_gets_the_answer_that_runs_or_ran_at_the_first(cluster: Cluster) -> None:
    a, b = cluster.routers
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(keyed_until_answered, router, "both", ASKS[0]) for router in (a, b)]
        answers = [one.result().json() for one in both]
    again = keyed(b, "both", ASKS[0])
    assert {answer["id"] for answer in answers} == {again.json()["id"]}, "one execution for all three"
    assert again.json()["choices"][0]["text"] == cluster.wanted[0].text
    assert keyed(b, "both", ASKS[1]).status_code == 422


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_router_disturbs_no_stream_of_the_other_and_knows_everything_again(
    cluster: Cluster, victim: int
) -> None:
    dying, living = cluster.routers[victim], cluster.routers[1 - victim]
    key = f"killed-{victim}"
    with ThreadPoolExecutor(STREAMS + 2) as pool:
        streams, begun = under_load(living, pool)
        lost = pool.submit(keyed, dying, key, LONG)
        begun.wait()
        kill_gateway(dying)
        with pytest.raises(httpx.TransportError):
            lost.result()
        retry = pool.submit(keyed_until_answered, living, key, LONG)
        await_rebuilt(dying, living)
        retried = retry.result()
        assert_undisturbed(streams, cluster.wanted)
    assert retried.json()["choices"][0]["text"] == cluster.wanted_long.text
    assert keyed(living, key, LONG).json()["id"] == retried.json()["id"]
    assert keyed(dying, key, LONG).json()["id"] == retried.json()["id"]
    living.eventually(lambda: all(engine["running"] == 0 for engine in living.engines().values()))


def test_without_redis_streams_go_on_and_with_it_everything_is_as_before(cluster: Cluster) -> None:
    a, b = cluster.routers
    with ThreadPoolExecutor(2 * STREAMS) as pool:
        (streams_a, begun_a), (streams_b, begun_b) = under_load(a, pool), under_load(b, pool)
        begun_a.wait()
        begun_b.wait()
        cluster.redis.kill()
        for router in (a, b):
            router.eventually(lambda router=router: degraded(router) == ["redis"])  # type: ignore[misc]
        assert_undisturbed(streams_a, cluster.wanted)
        assert_undisturbed(streams_b, cluster.wanted)
    assert not ask(a, ASKS[0]).wrong(cluster.wanted[0]), "new requests are served"
    assert keyed(b, "new", ASKS[0]).status_code == 503, "nobody can tell whether another router executes it"
    cluster.redis.start()
    for router in (a, b):
        router.eventually(lambda router=router: degraded(router) == [])  # type: ignore[misc]
        router.eventually(lambda router=router: metric(router, "pdserve_other_routers") == 1)  # type: ignore[misc]
    assert keyed_until_answered(b, "new", ASKS[0]).status_code == 200
    assert set(a.engines()) == {"prefill-0", "decode-0"}


def degraded(router: Deployment) -> list[str]:
    missing: list[str] = httpx.get(f"{router.url}/ready", timeout=10).json().get("degraded", [])
    return missing
