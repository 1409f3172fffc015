"""Looking into rendered manifests."""

from collections.abc import Iterator
from typing import Any

import yaml

from deploy.chart import Manifest


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name."""
    (found,) = [manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name]
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, template of a pod) of everything that makes pods."""
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        match manifest["kind"]:
            case "Deployment" | "StatefulSet":
                yield name, manifest["spec"]["template"]
            case "Pod":
                yield name, manifest
            case "RayCluster":
                yield f"{name}-head", manifest["spec"]["headGroupSpec"]["template"]
                for group in manifest["spec"]["workerGroupSpecs"]:
                    yield f"{name}-{group['groupName']}", group["template"]
            case "LeaderWorkerSet":
                yield name, manifest["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
                yield f"{name}-host", manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]


def selects(selector: dict[str, str], template: dict[str, Any]) -> bool:
    labels: dict[str, str] = template["metadata"]["labels"]
    return selector.items() <= labels.items()


def secrets_of(container: dict[str, Any]) -> set[str]:
    """Names of the Secrets that its environment is from."""
    sources = [entry.get("valueFrom", {}) for entry in container.get("env", [])]
    return {source["secretKeyRef"]["name"] for source in sources if "secretKeyRef" in source}


def deciders(manifests: list[Manifest]) -> set[str]:
    """Names of what makes the pods whose account is bound to a Role."""
    bound = {subject["name"] for binding in of_kind(manifests, "RoleBinding") for subject in binding["subjects"]}
    return {name for name, pod in pods(manifests) if pod["spec"]["serviceAccountName"] in bound}


def config_file(manifests: list[Manifest], name: str) -> Any:
    """A file of the release's ConfigMap."""
    return yaml.safe_load(named(manifests, "ConfigMap", "pdserve-config")["data"][name])
