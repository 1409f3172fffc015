"""Nodes that run nothing: each pod bound to one of them is said to run and to be ready, and one that is deleted to have
ended at once. What the scheduler and controllers do with pods is real.

`python -m tests.k8s.fake_kubelet KUBECONFIG NAME…`, until it is killed. A server that does not answer is asked again.
"""

import sys
import threading
import time
from datetime import UTC, datetime
from itertools import count
from typing import Any

from urllib3.exceptions import HTTPError

CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": "8"}
"""Of each node, until a test says otherwise."""
_HEARTBEAT = 10.0
_PAUSE = 0.5
_CONDITIONS = ("PodScheduled", "Initialized", "ContainersReady", "Ready")


class FakeKubelet:
    """One for several nodes."""

    def __init__(self, kubeconfig: str, nodes: tuple[str, ...]) -> None:
        from kubernetes import client, config  # the extra k8s, which collecting tests must not need

        self._nodes = nodes
        self._refused = client.ApiException
        self._core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
        self._addresses = count(2)

    def register(self) -> None:
        for name in self._nodes:
            self._core.create_node({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
            self._core.patch_node_status(name, {"status": {"capacity": CAPACITY, "allocatable": CAPACITY}})

    def beat(self) -> None:
        """Say again and again that the nodes are well."""
        while True:
            for name in self._nodes:
                condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": _now()}
                try:
                    self._core.patch_node_status(name, {"status": {"conditions": [condition]}})
                except (self._refused, HTTPError) as error:
                    print(f"{name}: {error}", file=sys.stderr)
            time.sleep(_HEARTBEAT)

    def run_pods(self) -> None:
        """Follow all pods; each new watch begins with those that there are."""
        from kubernetes import watch

        while True:
            try:
                for event in watch.Watch().stream(self._core.list_pod_for_all_namespaces, timeout_seconds=300):
                    if event["type"] != "DELETED" and event["object"].spec.node_name in self._nodes:
                        self._settle(event["object"])
            except (self._refused, HTTPError) as error:
                print(f"pods: {error}", file=sys.stderr)
                time.sleep(_PAUSE)

    def _settle(self, pod: Any) -> None:
        """Bring a pod's state to where its node would."""
        name, namespace = pod.metadata.name, pod.metadata.namespace
        try:
            if pod.metadata.deletion_timestamp:
                at_once = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.metadata.uid}}
                self._core.delete_namespaced_pod(name, namespace, body=at_once)
            elif pod.status.phase == "Pending":
                self._core.patch_namespaced_pod_status(name, namespace, {"status": self._running(pod)})
        except self._refused as error:
            if error.status not in (404, 409):  # gone or changed meanwhile: another event tells
                raise

    def _running(self, pod: Any) -> dict[str, Any]:
        since = _now()
        number = next(self._addresses)
        address = f"10.244.{number // 250 % 250}.{number % 250 + 1}"
        containers = [
            {
                "name": container.name,
                "image": container.image,
                "imageID": "",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": since}},
            }
            for container in pod.spec.containers
        ]
        return {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "startTime": since,
            "conditions": [{"type": kind, "status": "True", "lastTransitionTime": since} for kind in _CONDITIONS],
            "containerStatuses": containers,
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    kubelet = FakeKubelet(sys.argv[1], tuple(sys.argv[2:]))
    kubelet.register()
    threading.Thread(target=kubelet.beat, daemon=True).start()
    kubelet.run_pods()


if __name__ == "__main__":
    main()
