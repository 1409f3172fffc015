"""The cluster of KUBECONFIG."""

import os
from collections.abc import Iterator
from secrets import token_hex
from typing import Any

import helm_python
import pytest

from deploy.chart import CHART

WAIT = 300
"""Seconds for pods to be ready."""


class Cluster:
    """A namespace of its own, and Helm in it."""

    def __init__(self, kubeconfig: str, namespace: str) -> None:
        from kubernetes import config  # the extra k8s, which collecting tests must not need
        from kubernetes.dynamic import DynamicClient

        self.namespace = namespace
        self._api = DynamicClient(config.new_client_from_config(kubeconfig))
        self.helm = helm_python.Config(kubeconfig_path=kubeconfig, namespace=namespace)

    def install(self, name: str, values: dict[str, Any], **options: Any) -> Any:
        return self.helm.install(CHART, name, values, namespace=self.namespace, timeout=WAIT, **options)

    def upgrade(self, name: str, values: dict[str, Any]) -> None:
        self.helm.upgrade(CHART, name, values, namespace=self.namespace, timeout=WAIT, wait="watcher")

    def get(self, version: str, kind: str, name: str) -> Any:
        return self._resource(version, kind).get(name=name, namespace=self.namespace)

    def objects(self, release: str) -> set[tuple[str, str]]:
        """(kind, name) of everything that carries the release's label."""
        found = set()
        for version, kind in _KINDS:
            listed = self._resource(version, kind).get(
                namespace=self.namespace, label_selector=f"app.kubernetes.io/instance={release}"
            )
            found |= {(kind, item.metadata.name) for item in listed.items}
        return found

    def create_namespace(self) -> None:
        body = {"metadata": {"name": self.namespace}}
        self._resource("v1", "Namespace").create(body=body)

    def delete_namespace(self) -> None:
        self._resource("v1", "Namespace").delete(name=self.namespace)

    def _resource(self, version: str, kind: str) -> Any:
        return self._api.resources.get(api_version=version, kind=kind)


_KINDS = (
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("v1", "Pod"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    kubeconfig = os.environ.get("KUBECONFIG")
    if not kubeconfig:
        pytest.fail("KUBECONFIG names no cluster")
    cluster = Cluster(kubeconfig, f"pdserve-test-{token_hex(4)}")
    cluster.create_namespace()
    yield cluster
    cluster.delete_namespace()
