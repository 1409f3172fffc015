"""Install, upgrade, rollback and uninstall against a real API server."""

import time
from typing import Any

import pytest

from deploy.chart import overlaid, values_file
from tests.chart.test_render import MATRIX
from tests.k8s.cluster import Cluster

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(900)]

DEMO = values_file("cpu-demo")


def replicas(cluster: Cluster, name: str) -> Any:
    return cluster.get("apps/v1", "StatefulSet", name).spec.replicas


def test_what_is_installed_is_changed_put_back_and_taken_away(cluster: Cluster) -> None:
    cluster.install("demo", DEMO, wait="watcher")
    keys = cluster.get("v1", "Secret", "demo-pdserve-api-keys").data["api-keys"]
    assert replicas(cluster, "demo-pdserve-decode") == 1
    assert {kind for kind, _ in cluster.objects("demo")} >= {"Deployment", "StatefulSet", "NetworkPolicy", "Pod"}

    cluster.upgrade("demo", overlaid(DEMO, {"decode": {"replicas": 2}, "config": {"max_model_len": 1024}}))
    assert replicas(cluster, "demo-pdserve-decode") == 2
    assert cluster.get("v1", "Secret", "demo-pdserve-api-keys").data["api-keys"] == keys, "keys survive an upgrade"
    assert "max_model_len: 1024" in cluster.get("v1", "ConfigMap", "demo-pdserve-config").data["router.yaml"]

    cluster.helm.rollback("demo", timeout=300, wait="watcher")
    assert replicas(cluster, "demo-pdserve-decode") == 1
    assert cluster.get("v1", "Secret", "demo-pdserve-api-keys").data["api-keys"] == keys

    cluster.helm.uninstall("demo", timeout=300, wait="watcher")
    deadline = time.monotonic() + 120
    while left := cluster.objects("demo"):
        assert time.monotonic() < deadline, left
        time.sleep(1)


@pytest.mark.parametrize("name", MATRIX)
def test_the_server_takes_every_variant(cluster: Cluster, kinds_of_operators: None, name: str) -> None:
    """As a dry run, which validates."""
    if name == "image volume" and cluster.version() < (1, 33):
        pytest.skip("the server does not know image volumes")
    manifest = cluster.install("variant", MATRIX[name], dry_run="server")
    assert manifest
