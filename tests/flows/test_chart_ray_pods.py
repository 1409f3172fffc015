"""The chart with ray.mode builtin, as processes: Ray nodes that join, a supervisor that places engines on them."""

import os
from pathlib import Path

import pytest

from deploy.chart import overlaid, values_file
from tests.pods import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="Ray nodes of one machine need namespaces, and those need root"),
]


def test_helm_test_passes_on_builtin_ray(tmp_path: Path) -> None:
    with running(overlaid(values_file("cpu-demo"), {"ray": {"mode": "builtin"}}), tmp_path) as release:
        pod = release.helm_test()
        assert pod.ended() == 0, pod.said()
        assert "disaggregated" in pod.said()
