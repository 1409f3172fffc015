"""What tests rely on: a scheduler that counts GPUs, controllers, rights, and a server that returns with its memory."""

from typing import Any

import pytest

from tests.k8s.cluster import Cluster
from tests.k8s.control_plane import ControlPlane
from tests.k8s.nodes import Nodes
from tests.waiting import eventually

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(300)]


def sleepers(replicas: int, gpus: int) -> dict[str, Any]:
    labels = {"app": "sleeper"}
    limits = {"cpu": "1", "nvidia.com/gpu": str(gpus)}
    container = {"name": "sleeper", "image": "sleeper", "resources": {"limits": limits}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "sleeper"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
        },
    }


def ready(cluster: Cluster) -> int:
    return cluster.get("apps/v1", "Deployment", "sleeper").status.readyReplicas or 0


def test_pods_without_a_gpu_are_pending(cluster: Cluster, nodes: Nodes) -> None:
    cluster.create(sleepers(replicas=5, gpus=4))
    eventually(lambda: ready(cluster) == 4)
    nodes.offer_gpus(12)
    eventually(lambda: ready(cluster) == 5)


def test_a_server_that_returns_goes_on(cluster: Cluster, control_plane: ControlPlane) -> None:
    cluster.create(sleepers(replicas=1, gpus=1))
    eventually(lambda: ready(cluster) == 1)
    control_plane.restart_api()
    cluster.patch("apps/v1", "Deployment", "sleeper", {"spec": {"replicas": 2}})
    eventually(lambda: ready(cluster) == 2)


def test_an_account_may_do_what_its_role_says(cluster: Cluster) -> None:
    rules = [{"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "patch"]}]
    account = cluster.account("few-rights", rules)
    cluster.create(sleepers(replicas=1, gpus=1))

    from kubernetes import client, config

    apps = client.AppsV1Api(config.new_client_from_config(str(account.kubeconfig)))
    apps.patch_namespaced_deployment_scale("sleeper", cluster.namespace, {"spec": {"replicas": 3}})
    assert cluster.get("apps/v1", "Deployment", "sleeper").spec.replicas == 3
    with pytest.raises(client.ApiException, match="Forbidden"):
        apps.list_namespaced_deployment(cluster.namespace)
