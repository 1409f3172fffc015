"""`pdserve scale` against a real API server, by the rights its chart gives it."""

import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.cluster import Cluster
from tests.k8s.control_plane import ControlPlane
from tests.k8s.groups import KIND, VERSION, leader_worker_set, making_groups
from tests.k8s.nodes import Nodes
from tests.k8s.scalers import LEASE, Scalers, rules, scaling

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(300)]


def holder_of_pods(kind: str, name: str, gpus: int = 0) -> dict[str, Any]:
    """One pod at first."""
    labels = {"app": name}
    limits = {"cpu": "1"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    container = {"name": "engine", "image": "engine", "resources": {"limits": limits}}
    spec = {
        "replicas": 1,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
    }
    if kind == "StatefulSet":
        spec |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def ray_cluster() -> dict[str, Any]:
    groups: list[dict[str, Any]] = [
        {"groupName": name, "replicas": 1, "template": {"spec": {}}} for name in ("other", "decode")
    ]
    metadata = {"name": "ray"}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": {"workerGroupSpecs": groups}}


@pytest.fixture
def scalers(cluster: Cluster, tmp_path: Path) -> Iterator[Scalers]:
    """Of a StatefulSet and a Deployment."""
    cluster.create(holder_of_pods("StatefulSet", "prefill"))
    cluster.create(holder_of_pods("Deployment", "decode"))
    account = cluster.account("scaler", rules())
    targets = {"prefill": "StatefulSet/prefill", "decode": "Deployment/decode"}
    with scaling(tmp_path, cluster.namespace, account.kubeconfig, **targets) as scalers:
        yield scalers


def replicas(cluster: Cluster) -> tuple[int, int]:
    """Of prefill and decode, as they are asked for."""
    prefill, decode = cluster.get("apps/v1", "StatefulSet", "prefill"), cluster.get("apps/v1", "Deployment", "decode")
    return prefill.spec.replicas, decode.spec.replicas


def events(cluster: Cluster) -> list[tuple[str, str, str]]:
    """(reason, kind, message) of the scaler's."""
    from kubernetes import client, config

    core = client.CoreV1Api(config.new_client_from_config(cluster.kubeconfig))
    own = [e for e in core.list_namespaced_event(cluster.namespace).items if e.source.component == "pdserve-scaler"]
    return [(event.reason, event.involved_object.kind, event.message) for event in own]


def grant(cluster: Cluster, account: str) -> None:
    """The whole of the scaler's rights, besides those it has."""
    group, name = "rbac.authorization.k8s.io", "whole"
    role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules()}
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account}],
    }
    cluster.create(role)
    cluster.create(binding)


def test_pods_follow_the_policy_up_and_down_and_events_tell(cluster: Cluster, scalers: Scalers) -> None:
    scaler = scalers.start()
    scalers.eventually(lambda: scaler.pool("prefill") == scaler.pool("decode") == (1, 1, 0))
    assert scaler.explanation()["decisions"] == []
    scalers.decide(prefill=3, decode=2)
    scalers.eventually(lambda: replicas(cluster) == (3, 2))
    scalers.eventually(lambda: (scaler.pool("prefill"), scaler.pool("decode")) == ((3, 3, 0), (2, 2, 0)))
    scalers.decide(prefill=2, decode=1)
    scalers.eventually(lambda: replicas(cluster) == (2, 1))
    scalers.eventually(lambda: (scaler.pool("prefill"), scaler.pool("decode")) == ((2, 2, 0), (1, 1, 0)))
    scalers.eventually(lambda: len(events(cluster)) == 4)
    assert {(reason, kind) for reason, kind, _ in events(cluster)} == {
        ("ScaledUp", "StatefulSet"),
        ("ScaledUp", "Deployment"),
        ("ScaledDown", "StatefulSet"),
        ("ScaledDown", "Deployment"),
    }
    assert any(message.startswith("prefill from 1 to 3 engines; bounds: ") for _, _, message in events(cluster))
    assert 'pdserve_scaler_engines{kind="ready",role="prefill"} 2.0' in scaler.metrics().splitlines()
    scaler.process.send_signal(signal.SIGTERM)
    assert scaler.process.wait(20) == 0


@pytest.mark.usefixtures("kinds_of_operators")
def test_a_group_of_a_ray_cluster_is_scaled_wherever_it_stands_and_the_others_stay(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.create(ray_cluster())
    cluster.create(holder_of_pods("StatefulSet", "prefill"))
    account = cluster.account("scaler", rules())
    targets = {"prefill": "StatefulSet/prefill", "decode": "RayCluster/ray/decode"}

    def groups() -> dict[str, int]:
        found = cluster.get("ray.io/v1", "RayCluster", "ray").spec.workerGroupSpecs
        return {group.groupName: group.replicas for group in found}

    def has(decode: int) -> bool:
        return groups() == {"other": 1, "decode": decode}

    over = threading.Event()

    def change_places() -> None:
        first, second = (f"/spec/workerGroupSpecs/{place}" for place in range(2))
        while not over.is_set():
            cluster.patch("ray.io/v1", "RayCluster", "ray", [{"op": "move", "from": second, "path": first}])

    with scaling(tmp_path, cluster.namespace, account.kubeconfig, **targets) as scalers:
        scalers.decide(decode=4)
        scaler = scalers.start()
        scalers.eventually(partial(has, 4))
        meddler = threading.Thread(target=change_places)
        meddler.start()
        try:
            for number in count(1):
                scalers.decide(decode=1 + number % 2)
                scalers.eventually(partial(has, 1 + number % 2))
                if "scaling met another change, trying again" in scaler.said():
                    break
                assert number < 50, "the groups never changed places between a look and a change"
        finally:
            over.set()
            meddler.join()


@pytest.mark.usefixtures("kinds_of_operators")
def test_groups_of_pods_are_engines_and_one_without_gpus_counts_as_nothing(
    cluster: Cluster, nodes: Nodes, tmp_path: Path
) -> None:
    """Eight GPUs on each of two nodes: two groups of two pods with four each fit."""
    cluster.create(leader_worker_set("decode", size=2, gpus=4))
    cluster.create(holder_of_pods("StatefulSet", "prefill"))
    account = cluster.account("scaler", rules())
    targets = {"prefill": "StatefulSet/prefill", "decode": "LeaderWorkerSet/decode"}

    def groups() -> int:
        return int(cluster.get(VERSION, KIND, "decode").spec.replicas)

    with (
        making_groups(cluster, "decode"),
        scaling(tmp_path, cluster.namespace, account.kubeconfig, **targets) as scalers,
    ):
        scaler = scalers.start()
        scalers.eventually(lambda: scaler.pool("decode") == (1, 1, 0))
        scalers.decide(decode=2)
        scalers.eventually(lambda: groups() == 2 and scaler.pool("decode") == (2, 2, 0))
        scalers.decide(decode=3)
        scalers.eventually(lambda: groups() == 3 and scaler.pool("decode") == (3, 2, 0))
        nodes.offer_gpus(12)
        scalers.eventually(lambda: scaler.pool("decode") == (3, 3, 0))
        scalers.decide(decode=1)
        scalers.eventually(lambda: groups() == 1 and scaler.pool("decode") == (1, 1, 0))
        scalers.eventually(lambda: len(cluster.labels_of_pods("leaderworkerset.sigs.k8s.io/name=decode")) == 2)
        scalers.eventually(lambda: ("ScaledDown", KIND) in {(reason, kind) for reason, kind, _ in events(cluster)})


def test_while_the_api_server_is_away_nothing_changes_and_then_it_goes_on(
    cluster: Cluster, scalers: Scalers, control_plane: ControlPlane
) -> None:
    scaler = scalers.start()
    scalers.decide(prefill=2)
    scalers.eventually(lambda: scaler.pool("prefill") == (2, 2, 0))
    control_plane.stop_api()
    try:
        scalers.eventually(lambda: "pdserve_scaler_blind 1.0" in scaler.metrics())
        before = scaler.explanation()
        assert "does not answer" in before["blind"]
        scalers.decide(prefill=3)
        time.sleep(LEASE)
        assert scaler.lives()
        assert not scaler.leads(), "a leader that cannot renew stops acting"
    finally:
        control_plane.start_api()
    scalers.eventually(lambda: replicas(cluster) == (3, 1))
    scalers.eventually(lambda: scaler.pool("prefill") == (3, 3, 0))


def test_others_that_change_the_same_objects_do_not_keep_it_from_scaling(cluster: Cluster, scalers: Scalers) -> None:
    over = threading.Event()
    changes: list[None] = []

    def meddle() -> None:
        while not over.is_set():
            annotations = {"metadata": {"annotations": {"changed": str(len(changes))}}}
            cluster.patch("apps/v1", "StatefulSet", "prefill", annotations)
            cluster.patch("apps/v1", "Deployment", "decode", annotations)
            changes.append(None)

    def scaled(number: int) -> bool:
        return replicas(cluster) == (number, number)

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        scaler = scalers.start()
        for number in (4, 2, 5):
            scalers.decide(prefill=number, decode=number)
            scalers.eventually(partial(scaled, number))
        assert scaler.explanation()["failures"] == {}
        assert len(changes) > 10
    finally:
        over.set()
        meddler.join()


def test_what_is_denied_is_told_loudly_and_ends_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.create(holder_of_pods("StatefulSet", "prefill"))
    cluster.create(holder_of_pods("Deployment", "decode"))
    account = cluster.account("scaler", rules("patch"))
    targets = {"prefill": "StatefulSet/prefill", "decode": "Deployment/decode"}
    with scaling(tmp_path, cluster.namespace, account.kubeconfig, **targets) as scalers:
        scaler = scalers.start()
        scalers.decide(prefill=2)
        scalers.eventually(lambda: scaler.explanation()["failures"].get("denied", 0) >= 2)
        failure = scaler.explanation()["latest_failure"]
        assert failure.startswith("scaling StatefulSet/prefill is not allowed")
        assert 'cannot patch resource "statefulsets/scale"' in failure
        assert 'pdserve_scaler_failures_total{code="denied"}' in scaler.metrics()
        assert "scaling failed" in scaler.said()
        scalers.eventually(lambda: any(reason == "ScalingFailed" for reason, _, _ in events(cluster)))
        assert replicas(cluster) == (1, 1)
        grant(cluster, "scaler")
        scalers.eventually(lambda: replicas(cluster) == (2, 1))
        scalers.eventually(lambda: scaler.explanation()["latest_failure"] == "")


def test_of_scalers_that_start_at_once_one_leads(cluster: Cluster, scalers: Scalers) -> None:
    rivals = [scalers.start(f"scaler-{number}") for number in range(3)]
    scalers.decide(prefill=2)

    def leaders() -> list[str]:
        leading = [scaler.name for scaler in rivals if scaler.leads()]
        assert len(leading) <= 1
        return leading

    def holder() -> str:
        return str(cluster.get("coordination.k8s.io/v1", "Lease", "pdserve-scaler").spec.holderIdentity)

    scalers.eventually(lambda: replicas(cluster) == (2, 1) and all(scaler.lives() for scaler in rivals))
    scalers.eventually(lambda: leaders() == [holder()])
    begun = time.monotonic()
    while time.monotonic() - begun < LEASE:
        leaders()


def test_another_scaler_takes_over_from_one_that_ends_or_dies(cluster: Cluster, scalers: Scalers) -> None:
    first = scalers.start("scaler-0")
    scalers.decide(prefill=3)
    scalers.eventually(lambda: replicas(cluster) == (3, 1))
    second = scalers.start("scaler-1")
    scalers.eventually(second.lives)
    assert first.leads()
    assert not second.leads()

    begun = time.monotonic()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(20) == 0
    scalers.eventually(second.leads)
    assert time.monotonic() - begun < LEASE, "a Lease that is given back is free at once"
    scalers.eventually(lambda: second.pool("prefill") == (3, 3, 0))
    assert second.explanation()["decisions"] == [], "a new leader begins with the pools as they are"

    third = scalers.start("scaler-2")
    scalers.eventually(third.lives)
    second.process.kill()
    scalers.eventually(third.leads, within=60)
    assert cluster.get("coordination.k8s.io/v1", "Lease", "pdserve-scaler").spec.holderIdentity == "scaler-2"
    scalers.decide(prefill=2)
    scalers.eventually(lambda: replicas(cluster) == (2, 1))


def test_pods_that_find_no_gpu_count_as_nothing(cluster: Cluster, nodes: Nodes, tmp_path: Path) -> None:
    cluster.create(holder_of_pods("StatefulSet", "prefill", gpus=4))
    cluster.create(holder_of_pods("StatefulSet", "decode"))
    account = cluster.account("scaler", rules())
    targets = {"prefill": "StatefulSet/prefill", "decode": "StatefulSet/decode"}
    with scaling(tmp_path, cluster.namespace, account.kubeconfig, **targets) as scalers:
        scaler = scalers.start()
        scalers.decide(prefill=6)
        scalers.eventually(lambda: scaler.pool("prefill") == (6, 4, 0))
        scalers.decide(prefill=6, decode=2)
        scalers.eventually(lambda: scaler.pool("decode") == (2, 2, 0))
        nodes.offer_gpus(12)
        scalers.eventually(lambda: scaler.pool("prefill") == (6, 6, 0))
