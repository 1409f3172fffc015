"""A namespace of a cluster: objects and Helm releases in it, and accounts with few rights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python

from deploy.chart import CHART
from tests.k8s.control_plane import write_kubeconfig

WAIT = 300
"""Seconds for pods to be ready."""
_KINDS = (
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("v1", "Pod"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
)


@dataclass(frozen=True)
class Account:
    """How a service account reaches the server."""

    kubeconfig: Path
    server: str
    authority: Path
    token: str


class Cluster:
    """A namespace of its own, which is made and deleted by its owner."""

    def __init__(self, kubeconfig: str, namespace: str, folder: Path) -> None:
        from kubernetes import client, config  # the extra k8s, which collecting tests must not need
        from kubernetes.dynamic import DynamicClient

        self.namespace = namespace
        self.kubeconfig = kubeconfig
        self.helm = helm_python.Config(kubeconfig_path=kubeconfig, namespace=namespace)
        self._folder = folder
        self._client = config.new_client_from_config(kubeconfig)
        self._core = client.CoreV1Api(self._client)
        self._dynamic = DynamicClient(self._client)

    def install(self, name: str, values: dict[str, Any], **options: Any) -> Any:
        return self.helm.install(CHART, name, values, namespace=self.namespace, timeout=WAIT, **options)

    def upgrade(self, name: str, values: dict[str, Any]) -> None:
        self.helm.upgrade(CHART, name, values, namespace=self.namespace, timeout=WAIT, wait="watcher")

    def get(self, version: str, kind: str, name: str) -> Any:
        return self._resource(version, kind).get(name=name, namespace=self.namespace)

    def create(self, manifest: dict[str, Any]) -> Any:
        return self._resource(manifest["apiVersion"], manifest["kind"]).create(manifest, namespace=self.namespace)

    def patch(self, version: str, kind: str, name: str, change: dict[str, Any] | list[dict[str, Any]]) -> None:
        """A merge patch, or a JSON patch if it is a list."""
        content_type = f"application/{'json' if isinstance(change, list) else 'merge'}-patch+json"
        self._resource(version, kind).patch(change, name=name, namespace=self.namespace, content_type=content_type)

    def delete(self, version: str, kind: str, name: str) -> None:
        self._resource(version, kind).delete(name=name, namespace=self.namespace)

    def labels_of_pods(self, selector: str) -> list[dict[str, str]]:
        """Of each pod that the selector chooses."""
        listed = self._core.list_namespaced_pod(self.namespace, label_selector=selector)
        return [dict(pod.metadata.labels) for pod in listed.items]

    def version(self) -> tuple[int, int]:
        """The server's, (1, 33) say."""
        from kubernetes import client

        told = client.VersionApi(self._client).get_code()
        return int(told.major), int(told.minor.rstrip("+"))

    def objects(self, release: str) -> set[tuple[str, str]]:
        """(kind, name) of everything that carries the release's label."""
        found = set()
        for version, kind in _KINDS:
            listed = self._resource(version, kind).get(
                namespace=self.namespace, label_selector=f"app.kubernetes.io/instance={release}"
            )
            found |= {(kind, item.metadata.name) for item in listed.items}
        return found

    def account(self, name: str, rules: list[dict[str, list[str]]]) -> Account:
        """A service account whose Role has these rules ({"apiGroups": …, "resources": …, "verbs": …}), and a token."""
        self.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        rbac = "rbac.authorization.k8s.io"
        self.create({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules})
        self.create(
            {
                "apiVersion": f"{rbac}/v1",
                "kind": "RoleBinding",
                "metadata": {"name": name},
                "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
                "subjects": [{"kind": "ServiceAccount", "name": name}],
            }
        )
        return self.account_of(name)

    def account_of(self, name: str) -> Account:
        """A token of a service account that there is, one of the chart's say."""
        from kubernetes import client

        request = client.AuthenticationV1TokenRequest(spec=client.V1TokenRequestSpec(audiences=[]))
        answer = self._core.create_namespaced_service_account_token(name, self.namespace, request)
        server, authority = self._client.configuration.host, Path(self._client.configuration.ssl_ca_cert)
        kubeconfig = self._folder / f"kubeconfig-{name}"
        write_kubeconfig(kubeconfig, server, authority, answer.status.token)
        return Account(kubeconfig, server, authority, answer.status.token)

    def create_namespace(self) -> None:
        self._core.create_namespace({"metadata": {"name": self.namespace}})

    def delete_namespace(self) -> None:
        self._core.delete_namespace(self.namespace)

    def _resource(self, version: str, kind: str) -> Any:
        return self._dynamic.resources.get(api_version=version, kind=kind)
