"""Kinds that operators bring, without the operators: the server keeps such objects and nobody acts on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KINDS = (
    ("ray.io", "v1", "RayCluster", "rayclusters"),
    ("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"),
    ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"),
)
_ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_LEADER_WORKER_SET = ("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets")
_SCALE = {
    "specReplicasPath": ".spec.replicas",
    "statusReplicasPath": ".status.replicas",
    "labelSelectorPath": ".status.hpaPodSelector",
}


@contextmanager
def defined(kubeconfig: str) -> Iterator[None]:
    """Those that the server does not know are defined, and taken back at the end."""
    from kubernetes import client, config

    api = client.ApiextensionsV1Api(config.new_client_from_config(kubeconfig))
    known = {item.metadata.name for item in api.list_custom_resource_definition().items}
    wanted = [*map(_definition, _KINDS), _scaled(_definition(_LEADER_WORKER_SET))]
    added = [definition for definition in wanted if definition["metadata"]["name"] not in known]
    for definition in added:
        api.create_custom_resource_definition(definition)
    try:
        yield
    finally:
        for definition in added:
            api.delete_custom_resource_definition(definition["metadata"]["name"])


def _definition(kind: tuple[str, str, str, str]) -> dict[str, Any]:
    group, version, name, plural = kind
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": name, "plural": plural, "singular": name.lower()},
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {**_ANYTHING, "properties": {"spec": _ANYTHING}}},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def _scaled(definition: dict[str, Any]) -> dict[str, Any]:
    """Its number of replicas, 1 unless somebody says so, is also read and set apart from the rest."""
    (version,) = definition["spec"]["versions"]
    version["subresources"]["scale"] = _SCALE
    schema = version["schema"]["openAPIV3Schema"]
    replicas = {"type": "integer", "minimum": 0, "default": 1}
    schema["properties"] = {"spec": {**_ANYTHING, "properties": {"replicas": replicas}}}
    return definition
