"""kustomize, as far as deploy/k8s goes: resources, a namespace, JSON patches (RFC 6902) of whole sections, deletions.
Anything else is refused, so that what is built here is what `kubectl kustomize` builds."""

from pathlib import Path
from typing import Any

import yaml

from deploy.chart import Manifest

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches"}


def build(folder: Path) -> list[Manifest]:
    """The manifests of a folder with a kustomization.yaml. Raises ValueError for what real kustomize would not take."""
    kustomization = _read(folder / "kustomization.yaml")
    if unknown := kustomization.keys() - _KNOWN:
        raise ValueError(f"{folder}: {unknown} is not supported here")
    manifests: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        manifests += build(path) if path.is_dir() else [_read(path)]
    for patch in kustomization.get("patches", []):
        manifests = _patched(manifests, _read(folder / patch["path"]), patch.get("target"))
    names = [_name(manifest) for manifest in manifests]
    if len(set(names)) != len(names):
        raise ValueError(f"{folder}: two objects of one name among {names}")
    return [_placed(manifest, kustomization["namespace"]) for manifest in manifests]


def _patched(manifests: list[Manifest], patch: Any, target: dict[str, str] | None) -> list[Manifest]:
    """With a target the patch is a list of operations, without one it names what to delete."""
    kind, name = (target["kind"], target["name"]) if target else _name(patch)
    (found,) = [manifest for manifest in manifests if _name(manifest) == (kind, name)]
    if not target:
        if patch.get("$patch") != "delete":
            raise ValueError(f"merging patches of {kind} {name} are not supported here")
        return [manifest for manifest in manifests if manifest is not found]
    return [_operated(manifest, patch) if manifest is found else manifest for manifest in manifests]


def _operated(manifest: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    changed = dict(manifest)
    for operation in operations:
        _, section = operation["path"].split("/")
        match operation["op"]:
            case "add":
                changed[section] = operation["value"]
            case "remove":
                del changed[section]
            case other:
                raise ValueError(f"operation {other} is not supported here")
    return changed


def _placed(manifest: Manifest, namespace: str) -> Manifest:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": namespace}}


def _name(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
