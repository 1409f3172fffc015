"""What an upgrade must leave as it is: how many pods a scaler has made, and the passwords that were made at first."""

from typing import Any

import pytest

from deploy.chart import overlaid, values_file
from tests.k8s.cluster import Cluster
from tests.k8s.groups import KIND, VERSION

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(900)]

DEMO = values_file("cpu-demo")
POLICIES = {"policies": {"pools": {"prefill": {"max": 8}, "decode": {"max": 8}}}}
OTHER = {"config": {"max_model_len": 1024}}


def pods_of(cluster: Cluster) -> tuple[int, int]:
    sizes = (cluster.get("apps/v1", "StatefulSet", f"demo-pdserve-{role}").spec.replicas for role in _ROLES)
    prefill, decode = map(int, sizes)
    return prefill, decode


def scale(cluster: Cluster, **sizes: int) -> None:
    """As a scaler does."""
    for role, size in sizes.items():
        cluster.patch("apps/v1", "StatefulSet", f"demo-pdserve-{role}", {"spec": {"replicas": size}})


_ROLES = ("prefill", "decode")


def test_a_release_with_a_policy_leaves_its_pods_to_the_scaler(cluster: Cluster) -> None:
    values = overlaid(DEMO, POLICIES)
    cluster.install("demo", values, wait="watcher")
    assert pods_of(cluster) == (1, 1)
    scale(cluster, prefill=3, decode=2)
    cluster.upgrade("demo", overlaid(values, OTHER))
    assert pods_of(cluster) == (3, 2)
    scale(cluster, decode=4)
    cluster.helm.rollback("demo", timeout=300, wait="watcher")
    assert pods_of(cluster) == (3, 4)


def test_a_policy_that_comes_later_begins_with_the_pods_that_are_there(cluster: Cluster) -> None:
    values = overlaid(DEMO, {"prefill": {"replicas": 2}, "decode": {"replicas": 3}})
    cluster.install("demo", values, wait="watcher")
    cluster.upgrade("demo", overlaid(values, POLICIES))
    assert pods_of(cluster) == (2, 3), "not one of each, as if nobody had said"
    scale(cluster, prefill=4, decode=1)
    cluster.upgrade("demo", overlaid(values, POLICIES, OTHER))
    assert pods_of(cluster) == (4, 1)


@pytest.mark.usefixtures("kinds_of_operators")
def test_groups_of_pods_stay_as_many_as_the_scaler_has_made(cluster: Cluster) -> None:
    pools = {"decode": {"tensor_parallel": 2, "hosts": 2}}
    values: dict[str, Any] = overlaid(DEMO, {"decode": {"replicas": 2}, "config": {"pools": pools}})

    def groups() -> int:
        return int(cluster.get(VERSION, KIND, "demo-pdserve-decode").spec.replicas)

    cluster.install("demo", values)
    assert groups() == 2
    cluster.upgrade("demo", overlaid(values, POLICIES))
    assert groups() == 2, "not one, as if nobody had said"
    cluster.patch(VERSION, KIND, "demo-pdserve-decode", {"spec": {"replicas": 3}})
    cluster.upgrade("demo", overlaid(values, POLICIES, OTHER))
    assert groups() == 3


def test_ray_nodes_stay_as_many_as_the_scaler_has_made(cluster: Cluster) -> None:
    values: dict[str, Any] = overlaid(DEMO, POLICIES, {"ray": {"mode": "builtin"}, "decode": {"replicas": 2}})
    cluster.install("demo", values, wait="watcher")
    assert pods_of(cluster) == (1, 2)
    scale(cluster, prefill=2, decode=3)
    cluster.upgrade("demo", overlaid(values, OTHER))
    assert pods_of(cluster) == (2, 3)


def test_the_password_of_redis_survives_an_upgrade(cluster: Cluster) -> None:
    values = overlaid(DEMO, {"redis": {"mode": "bundled"}})

    def password() -> Any:
        return cluster.get("v1", "Secret", "demo-pdserve-redis").data["password"]

    cluster.install("demo", values, wait="watcher")
    made = password()
    cluster.upgrade("demo", overlaid(values, OTHER))
    assert password() == made
