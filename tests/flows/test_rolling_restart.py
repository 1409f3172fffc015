"""Everything is restarted under load, one after another, as Kubernetes does it: all requests get the right answer."""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from deploy.chart import overlaid, values_file
from tests.checkpoints import make_checkpoint
from tests.deployment import Deployment, deployed, write_config
from tests.pods import running
from tests.redis_server import redis_server
from tests.rolling import loaded, replace_router, restart
from tests.steady_load import Tally

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = {"replicas": 2}
VALUES = overlaid(values_file("cpu-demo"), {"router": TWO, "prefill": TWO, "decode": TWO, "redis": {"mode": "bundled"}})
EVERY = 0.2
"""Seconds from one request to the next."""


def judge(tally: Tally, restarts: int) -> None:
    print(f"\n{restarts} restarts, {tally.asked.total()} requests {dict(tally.asked)}, {len(tally.failures)} failed")
    assert tally.failures == []
    assert min(tally.asked[kind] for kind in ("stream", "whole", "grpc")) > 20


def test_every_pod_of_the_chart_is_replaced(tmp_path: Path) -> None:
    with running(VALUES, tmp_path) as release:
        routers = release.routers()
        others = [pod for pod in release.pods.values() if pod not in routers]
        with loaded(release.router_hosts, every=EVERY, key=release.key) as tally:
            for router in routers:
                replace_router(release, router)
            for pod in reversed(others):
                restart(pod)
        judge(tally, len(routers) + len(others))


def test_supervisors_that_share_a_redis_and_the_redis_are_restarted(tmp_path: Path) -> None:
    """Each `pdserve serve` brings a router and two engines, which the other's router serves with, too."""
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3")
    with redis_server() as redis, ExitStack() as stack:
        hosts = {"a": "127.20.30.2", "b": "127.20.30.3"}
        up: dict[str, Deployment] = {}

        @contextmanager
        def served(name: str) -> Iterator[Deployment]:
            settings = {
                "model": str(checkpoint),
                "device": "cpu",
                "kv": {"memory": "8MiB"},
                "redis": {"url": redis.url},
                "engine_prefix": f"{name}-",
                "times": {"connection_age": 4.0},
            }
            config = write_config(tmp_path / f"{name}.yaml", settings)
            ports = ("--host", hosts[name], "--port", "8000", "--grpc-port", "8001")
            with deployed(tmp_path / f"{name}.log", str(config), *ports) as deployment:
                deployment.eventually(lambda: len(deployment.engines()) == 2 * min(2, len(up) + 1))
                yield deployment

        for name in hosts:
            up[name] = stack.enter_context(served(name))
        up["a"].eventually(lambda: len(up["a"].engines()) == 4)
        with loaded(lambda: [hosts[name] for name in tuple(up)], every=EVERY) as tally:
            redis.kill()
            time.sleep(2)
            redis.start()
            time.sleep(3)
            for name in hosts:
                ending = up.pop(name)
                ending.signal(signal.SIGTERM)
                assert ending.wait(60) == 0
                up[name] = stack.enter_context(served(name))
        judge(tally, 3)
