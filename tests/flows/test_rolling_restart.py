"""Every pod is restarted under load, one after another, as Kubernetes does it: all requests get the right answer."""

from pathlib import Path

import pytest

from deploy.chart import overlaid, values_file
from tests.pods import running
from tests.rolling import loaded, replace_router, restart
from tests.steady_load import Tally

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = {"replicas": 2}
VALUES = overlaid(values_file("cpu-demo"), {"router": TWO, "prefill": TWO, "decode": TWO})
EVERY = 0.2
"""Seconds from one request to the next."""


def judge(tally: Tally, restarts: int) -> None:
    print(f"\n{restarts} restarts, {tally.asked.total()} requests {dict(tally.asked)}, {len(tally.failures)} failed")
    assert tally.failures == []
    assert min(tally.asked[kind] for kind in ("stream", "whole", "grpc")) > 20


def test_every_pod_of_the_chart_is_replaced(tmp_path: Path) -> None:
    with running(VALUES, tmp_path) as release:
        routers = release.routers()
        engines = [pod for pod in release.pods.values() if pod not in routers]
        with loaded(release.router_hosts, every=EVERY, key=release.key) as tally:
            for router in routers:
                replace_router(release, router)
            for engine in reversed(engines):
                restart(engine)
        judge(tally, len(routers) + len(engines))
