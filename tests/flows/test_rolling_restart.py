"""A rolling restart of all pods of the chart, one after another, under load: every request is answered, and right."""

import time
from pathlib import Path

import pytest

from deploy.chart import overlaid, values_file
from tests.pods import running
from tests.rolling import loaded, replace_router, restart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO = {"replicas": 2}
VALUES = overlaid(values_file("cpu-demo"), {"router": TWO, "prefill": TWO, "decode": TWO})


def test_every_pod_is_replaced_and_no_request_fails(tmp_path: Path) -> None:
    with running(VALUES, tmp_path) as release:
        routers = release.routers()
        engines = [pod for pod in release.pods.values() if pod not in routers]
        with loaded(release, every=0.25) as tally:
            time.sleep(2)
            for router in routers:
                replace_router(release, router)
            for engine in reversed(engines):
                restart(engine)
        print(f"\n{len(routers) + len(engines)} restarts, {dict(tally.asked)}, {len(tally.failures)} failed")
        assert tally.failures == []
        assert min(tally.asked[kind] for kind in ("stream", "whole", "grpc")) > 20
