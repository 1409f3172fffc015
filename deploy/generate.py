"""Write what is generated: the schema of the chart's values, its dashboard, and the plain manifests in deploy/k8s.

python -m deploy.generate            write
python -m deploy.generate --check    exit with 1 when something differs
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy.chart import CHART, Manifest, overlaid, render, values_file
from deploy.dashboard import dashboard
from deploy.values import schema

K8S = Path(__file__).parent / "k8s"
NAMESPACE = "pdserve"
_KEPT_OUT = ("helm.sh/chart", "app.kubernetes.io/managed-by")
_NO_SECRETS = {
    "auth": {"existingSecret": "pdserve-api-keys"},
    "ray": {"existingSecret": "pdserve-ray-token"},
    "redis": {"existingSecret": "pdserve-redis"},
}
"""Plain manifests make no keys: whoever applies them does."""


def overlays() -> dict[str, dict[str, Any]]:
    """Values of each folder of deploy/k8s/overlays."""
    return {
        "cpu-demo": values_file("cpu-demo"),
        "h200": values_file("h200"),
        "production": overlaid(values_file("h200"), values_file("production")),
        "ray": overlaid(values_file("cpu-demo"), {"ray": {"mode": "builtin"}}),
    }


def chart_files() -> dict[Path, str]:
    """What is generated of the chart itself, by path."""
    return {CHART / "values.schema.json": _json(schema()), CHART / "files" / "dashboard.json": _json(dashboard())}


def manifests() -> dict[Path, str]:
    """deploy/k8s, by path, rendered from the chart as it lies there."""
    base = {_key(manifest): manifest for manifest in plain({})}
    generated = _folder(K8S / "base", base)
    for name, values in overlays().items():
        wanted = {_key(manifest): manifest for manifest in plain(values)}
        generated |= _overlay(K8S / "overlays" / name, base, wanted)
    return generated


def plain(values: dict[str, Any]) -> list[Manifest]:
    """Manifests for `kubectl apply`, without what only Helm has a use for: its test, its labels."""
    manifests = render(overlaid(_NO_SECRETS, values), namespace=NAMESPACE)
    return [_stripped(manifest) for manifest in manifests if "helm.sh/hook" not in _annotations(manifest)]


def stale() -> list[Path]:
    """Files that are not as they would be generated, or would not be."""
    wanted = {**chart_files(), **manifests()}
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    return [*differing, *(path for path in K8S.rglob("*.yaml") if path not in wanted)]


def main() -> None:
    if "--check" in sys.argv[1:]:
        for path in stale():
            print(f"{path.relative_to(K8S.parent)} differs: run python -m deploy.generate", file=sys.stderr)
        sys.exit(bool(stale()))
    _write(chart_files())
    shutil.rmtree(K8S, ignore_errors=True)
    _write(manifests())


def _write(texts: dict[Path, str]) -> None:
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _overlay(folder: Path, base: dict[str, Manifest], wanted: dict[str, Manifest]) -> dict[Path, str]:
    """A kustomization that changes what differs from the base, adds what it lacks and deletes what is not wanted."""
    changed = {key: _changes(base[key], new) for key, new in wanted.items() if key in base and base[key] != new}
    gone = {key: _deletion(base[key]) for key in sorted(base.keys() - wanted.keys())}
    added = {key: manifest for key, manifest in wanted.items() if key not in base}
    patches = [{"path": f"{key}.yaml", "target": _target(base[key])} for key in changed]
    patches += [{"path": f"{key}.yaml"} for key in gone]
    texts = {folder / f"{key}.yaml": _text(content) for key, content in {**changed, **gone, **added}.items()}
    resources = ["../../base", *(f"{key}.yaml" for key in added)]
    return texts | {folder / "kustomization.yaml": _kustomization(resources, patches)}


def _changes(before: Manifest, after: Manifest) -> list[dict[str, Any]]:
    """As a JSON patch (RFC 6902) of whole sections: merging patches keep what a list or section no longer has."""
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    gone = [{"op": "remove", "path": f"/{key}"} for key in keys if key not in after]
    return gone + [{"op": "add", "path": f"/{key}", "value": after[key]} for key in keys if key in after]


def _target(manifest: Manifest) -> dict[str, str]:
    return {"kind": manifest["kind"], "name": manifest["metadata"]["name"]}


def _folder(folder: Path, manifests: dict[str, Manifest]) -> dict[Path, str]:
    texts = {folder / f"{key}.yaml": _text(manifest) for key, manifest in manifests.items()}
    return texts | {folder / "kustomization.yaml": _kustomization([f"{key}.yaml" for key in manifests], [])}


def _kustomization(resources: list[str], patches: list[dict[str, Any]]) -> str:
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": NAMESPACE}
    return _text({**head, "resources": resources, **({"patches": patches} if patches else {})})


def _deletion(manifest: Manifest) -> Manifest:
    metadata = {"name": manifest["metadata"]["name"]}
    return {"$patch": "delete", "apiVersion": manifest["apiVersion"], "kind": manifest["kind"], "metadata": metadata}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _key(manifest: Manifest) -> str:
    return f"{manifest['kind'].lower()}-{manifest['metadata']['name']}"


def _annotations(manifest: Manifest) -> dict[str, str]:
    return manifest["metadata"].get("annotations") or {}


def _stripped(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _stripped(value) for key, value in node.items() if key not in _KEPT_OUT}
    return [_stripped(item) for item in node] if isinstance(node, list) else node


def _text(manifest: Any) -> str:
    return "# Generated by `python -m deploy.generate` from the Helm chart.\n" + yaml.dump(
        manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """Without anchors; long texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


if __name__ == "__main__":
    main()
