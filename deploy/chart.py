"""The Helm chart, rendered without a cluster. helm-python-sdk enters here only."""

import json
from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import _native

CHART = Path(__file__).parent / "helm" / "pdserve"
NOTES = "pdserve/templates/NOTES.txt"

Manifest = dict[str, Any]


class Refused(Exception):
    """The chart does not take these values; the message says why."""


def render(
    values: dict[str, Any], *, name: str = "pdserve", namespace: str = "pdserve", kube_version: str = ""
) -> list[Manifest]:
    """The manifests in the order of their templates, hooks included; for Helm's own version of Kubernetes unless one is
    named. Raises Refused."""
    manifests: list[Manifest] = []
    for path, text in sorted(_render(values, name, namespace, kube_version).items()):
        if path != NOTES:
            manifests += [manifest for manifest in yaml.safe_load_all(text) if manifest]
    return manifests


def notes(values: dict[str, Any], *, name: str = "pdserve", namespace: str = "pdserve") -> str:
    """What Helm prints after an install."""
    return _render(values, name, namespace)[NOTES]


def lint(values: dict[str, Any], kube_version: str) -> list[str]:
    """Complaints of `helm lint --strict`; a chart without an icon is none."""
    found = helm_python.lint(CHART, values, strict=True, kube_version=kube_version)
    told = [message["error"] for message in found["messages"] if message["error"] != "icon is recommended"]
    return [*told, *map(str, found["errors"])]


def values_file(name: str) -> dict[str, Any]:
    """One of the chart's example files: "h200" is values-h200.yaml."""
    values: dict[str, Any] = yaml.safe_load((CHART / f"values-{name}.yaml").read_text(encoding="utf-8"))
    return values


def overlaid(*layers: dict[str, Any]) -> dict[str, Any]:
    """Values files given after one another: sections are merged, anything else is replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            merged[key] = overlaid(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _render(values: dict[str, Any], name: str, namespace: str, kube_version: str = "") -> dict[str, str]:
    options = {"name": name, "namespace": namespace, "kube_version": kube_version}
    try:
        chart = helm_python.Chart.load(CHART)
        # Chart.render passes no version on, though Helm behind it takes one.
        text = _native.call_string("helm_render", chart._raw(), json.dumps(values), json.dumps(options))
    except helm_python.HelmError as error:
        raise Refused(str(error)) from None
    rendered: dict[str, str] = json.loads(text)
    return rendered
