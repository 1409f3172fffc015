"""In place of the operator of LeaderWorkerSets: the pods of each group are made, and go with it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.k8s.cluster import Cluster

VERSION, KIND = "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"
_DOMAIN = "leaderworkerset.sigs.k8s.io"
_EVERY = 0.2


def leader_worker_set(name: str, size: int, gpus: int = 0) -> dict[str, Any]:
    """One group at first, of so many pods, each with so many GPUs."""
    limits = {"cpu": "1"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    container = {"name": "engine", "image": "engine", "resources": {"limits": limits}}
    template = {"size": size, "workerTemplate": {"spec": {"containers": [container]}}}
    return {
        "apiVersion": VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {"replicas": 1, "leaderWorkerTemplate": template},
    }


@contextmanager
def making_groups(cluster: Cluster, name: str) -> Iterator[None]:
    """While the context is open."""
    over = threading.Event()
    maker = threading.Thread(target=_make, args=(cluster, name, over))
    maker.start()
    try:
        yield
    finally:
        over.set()
        maker.join()


def _make(cluster: Cluster, name: str, over: threading.Event) -> None:
    from kubernetes.client.exceptions import ApiException

    while not over.wait(_EVERY):
        with suppress(ApiException):  # of one that was made or has gone meanwhile: the next look tells
            _follow(cluster, name)


def _follow(cluster: Cluster, name: str) -> None:
    spec = cluster.get(VERSION, KIND, name).to_dict()["spec"]
    template = spec["leaderWorkerTemplate"]
    wanted = {(group, index) for group in range(spec["replicas"]) for index in range(template["size"])}
    there = {
        (int(labels[f"{_DOMAIN}/group-index"]), int(labels[f"{_DOMAIN}/worker-index"]))
        for labels in cluster.labels_of_pods(f"{_DOMAIN}/name={name}")
    }
    for group, index in sorted(wanted - there):
        cluster.create(_pod(name, group, index, template["workerTemplate"]["spec"]))
    for group, index in sorted(there - wanted):
        cluster.delete("v1", "Pod", _name(name, group, index))


def _name(name: str, group: int, index: int) -> str:
    return f"{name}-{group}-{index}" if index else f"{name}-{group}"


def _pod(name: str, group: int, index: int, spec: dict[str, Any]) -> dict[str, Any]:
    own = {"name": name, "group-index": str(group), "worker-index": str(index)}
    labels = {f"{_DOMAIN}/{label}": value for label, value in own.items()}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": _name(name, group, index), "labels": labels},
        "spec": spec,
    }
