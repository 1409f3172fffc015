"""`pdserve scale` in processes, over an API server of the test's own: it leads, scales, tells why, and hands over."""

import json
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from pdserve.cluster.k8s.rights import SCALER_RIGHTS
from tests.chart.prometheus import assert_scraped, scraping
from tests.chart.rules import OF_SCALER
from tests.deployment import write_config
from tests.k8s.scalers import SCALE, free_port, scaling
from tests.unit.cluster.k8s.api_server import NAMESPACE, serving


def kubeconfig(path: Path, server: str) -> Path:
    config = {
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {"token": "nobody-asks"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.timeout(240)
def test_one_of_two_scales_and_when_it_ends_the_other_does(tmp_path: Path) -> None:
    targets = {"prefill": "StatefulSet/prefill", "decode": "Deployment/decode"}
    with serving() as (api, _):
        api.makes_pods = True
        api.add_scale("statefulsets", "prefill", 1)
        api.add_scale("deployments", "decode", 1)
        settings = kubeconfig(tmp_path / "kubeconfig", api.url)
        with scaling(tmp_path, NAMESPACE, settings, **targets) as scalers:
            first = scalers.start("scaler-0")
            scalers.eventually(first.leads)
            scalers.decide(prefill=3)
            scalers.eventually(lambda: first.pool("prefill") == (3, 3, 0))
            assert api.replicas("deployments", "decode") == 1
            assert "pdserve_scaler_leader 1.0" in first.metrics()
            assert 'pdserve_scaler_engines{kind="ready",role="prefill"} 3.0' in first.metrics()
            scalers.eventually(lambda: [event["reason"] for event in api.events] == ["ScaledUp"])
            with scraping(first.probes, f"127.0.0.1:{free_port()}", tmp_path) as prometheus:
                assert_scraped(prometheus, lambda name: name.startswith(OF_SCALER))

            second = scalers.start("scaler-1")
            scalers.eventually(second.lives)
            assert not second.leads()
            assert "pdserve_scaler_leader 0.0" in second.metrics()
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(30) == 0
            scalers.eventually(second.leads)
            scalers.decide(prefill=2)
            scalers.eventually(lambda: api.replicas("statefulsets", "prefill") == 2)
            with pytest.raises(httpx.ConnectError):
                first.metrics()
        assert api.asked.keys() <= SCALER_RIGHTS


def test_without_a_policy_it_ends_with_what_to_do(tmp_path: Path) -> None:
    file = write_config(tmp_path / "scaler.yaml", {})
    ended = subprocess.run([*SCALE, "--config", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "policies: names no file" in ended.stderr
