"""Looking into rendered manifests."""

from collections.abc import Iterator
from typing import Any

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


def selects(selector: dict[str, str], template: dict[str, Any]) -> bool:
    labels: dict[str, str] = template["metadata"]["labels"]
    return selector.items() <= labels.items()
