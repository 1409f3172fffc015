"""Nodes of a control plane that has none: a fake kubelet in a process of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("node-0", "node-1")
_START_TIMEOUT = 60.0


class Nodes:
    """Of the names NAMES."""

    def __init__(self, kubeconfig: Path) -> None:
        from kubernetes import client, config

        self._core = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))

    def offer_gpus(self, number: int) -> None:
        """Say how many GPUs each node has."""
        offered = {"nvidia.com/gpu": str(number)}
        for name in NAMES:
            self._core.patch_node_status(name, {"status": {"capacity": offered, "allocatable": offered}})

    def are_ready(self) -> bool:
        ready = 0
        for node in self._core.list_node().items:
            conditions = {condition.type: condition.status for condition in node.status.conditions or []}
            ready += conditions.get("Ready") == "True" and not node.spec.taints
        return ready == len(NAMES)


@contextmanager
def running(kubeconfig: Path, folder: Path) -> Iterator[Nodes]:
    """Nodes that take pods."""
    with (folder / "kubelet.log").open("wb") as log:
        command = [sys.executable, "-m", "tests.k8s.fake_kubelet", str(kubeconfig), *NAMES]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        nodes = Nodes(kubeconfig)
        deadline = time.monotonic() + _START_TIMEOUT
        while not nodes.are_ready():
            assert process.poll() is None, (folder / "kubelet.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the nodes are not ready"
            time.sleep(0.2)
        yield nodes
    finally:
        process.kill()
        process.wait()
