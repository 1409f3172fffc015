"""How soon all is as before after a router, or Redis, was killed under load, and what others' streams felt of it.

Two routers, one Redis, 1 prefill and 1 decode engine. Each round kills one router (or Redis) while both routers stream,
and with it a request with an idempotency key, which its client repeats at the other router. Requests that ended with
other tokens than an undisturbed engine gives, twice, or not at all are counted.
"""

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.flows.test_several_routers import (
    ASKS,
    LONG,
    Cluster,
    await_rebuilt,
    degraded,
    engines_alone,
    keyed,
    keyed_until_answered,
    kill_gateway,
    metric,
    under_load,
)
from tests.redis_server import redis_server
from tests.streams import Stream, expected


def kill_a_router(cluster: Cluster, victim: int, round_number: int) -> dict[str, float]:
    dying, living = cluster.routers[victim], cluster.routers[1 - victim]
    key = f"round-{round_number}"
    with ThreadPoolExecutor(len(ASKS) + 2) as pool:
        streams, begun = under_load(living, pool)
        lost = pool.submit(keyed, dying, key, LONG)
        begun.wait()
        kill_gateway(dying)
        killed = time.monotonic()
        retry = pool.submit(_timed, living, key, killed)
        await_rebuilt(dying, living)
        rebuilt = time.monotonic() - killed
        repeated, answered = retry.result()
        results: list[Stream] = [stream.result() for stream in streams]
        assert isinstance(lost.exception(), httpx.TransportError)
    again = keyed(dying, key, LONG).json()
    return {
        "rebuilt_seconds": rebuilt,
        "retry_answered_seconds": answered,
        "longest_pause_of_others": max(stream.longest_pause for stream in results),
        "wrong": sum(bool(s.wrong(w)) for s, w in zip(results, cluster.wanted, strict=True))
        + (repeated.json()["choices"][0]["text"] != cluster.wanted_long.text),
        "executed_twice": int(again["id"] != repeated.json()["id"]),
    }


def _timed(router: Deployment, key: str, killed: float) -> tuple[httpx.Response, float]:
    answer = keyed_until_answered(router, key, LONG)
    return answer, time.monotonic() - killed


def kill_redis(cluster: Cluster, round_number: int) -> dict[str, float]:
    with ThreadPoolExecutor(2 * len(ASKS)) as pool:
        loads = [under_load(router, pool) for router in cluster.routers]
        for _, begun in loads:
            begun.wait()
        cluster.redis.kill()
        for router in cluster.routers:
            router.eventually(lambda router=router: degraded(router) == ["redis"])  # type: ignore[misc]
        results: list[Stream] = [stream.result() for streams, _ in loads for stream in streams]
    cluster.redis.start()
    back = time.monotonic()
    for router in cluster.routers:
        router.eventually(lambda router=router: metric(router, "pdserve_other_routers") == 1)  # type: ignore[misc]
        router.eventually(lambda router=router: degraded(router) == [])  # type: ignore[misc]
    seen = time.monotonic() - back
    keyed_until_answered(cluster.routers[0], f"redis-{round_number}", ASKS[0])
    return {
        "routers_see_each_other_seconds": seen,
        "new_keys_accepted_seconds": time.monotonic() - back,
        "longest_pause": max(stream.longest_pause for stream in results),
        "wrong": sum(bool(s.wrong(w)) for s, w in zip(results, (*cluster.wanted, *cluster.wanted), strict=True)),
    }


def measure(rounds: int) -> dict[str, Any]:
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "model", "qwen3")
        redis = stack.enter_context(redis_server())
        settings = {
            "model": str(checkpoint),
            "device": "cpu",
            "kv": {"memory": "8MiB"},
            "redis": {"url": redis.url},
        }
        config = str(write_config(folder / "cluster.yaml", settings))
        engines = stack.enter_context(engines_alone(folder / "engines.log", config))
        first, second = (
            stack.enter_context(deployed(folder / f"{name}.log", config, "--only", "router")) for name in "ab"
        )
        *wanted, wanted_long = expected(checkpoint, [*ASKS, LONG])
        cluster = Cluster(redis, engines, (first, second), wanted, wanted_long)
        routers = [kill_a_router(cluster, number % 2, number) for number in range(rounds)]
        redises = [kill_redis(cluster, number) for number in range(rounds)]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "streams_per_router": len(ASKS),
        "router_killed": _summary(routers),
        "redis_killed": _summary(redises),
    }


def _summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    worst = {name: max(one[name] for one in rounds) for name in rounds[0]}
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {"rounds": len(rounds), "median": median, "worst": worst}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router_recovery.json"))
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
