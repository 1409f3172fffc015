"""What kustomize makes of deploy/k8s is what the chart renders."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart import Manifest
from deploy.generate import K8S, NAMESPACE, overlays, plain
from tests.chart.kustomize import build

FOLDERS: dict[str, dict[str, Any]] = {"base": {}, **{f"overlays/{name}": made for name, made in overlays().items()}}


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_builds_what_the_chart_renders(folder: str) -> None:
    built = by_name(build(K8S / folder))
    if shutil.which("kubectl"):  # which brings the real one
        ran = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert by_name(list(yaml.safe_load_all(ran.stdout))) == built
    for manifest in built.values():
        assert manifest["metadata"].pop("namespace") == NAMESPACE
    assert built == by_name(plain(FOLDERS[folder]))


@pytest.mark.parametrize(
    ("kustomization", "patch", "told"),
    [
        ({"images": []}, None, "'images'"),
        ({}, {"$patch": "replace", "kind": "Service", "metadata": {"name": "a"}}, "merging patches of Service a"),
        (
            {"patches": [{"path": "patch.yaml", "target": {"kind": "Service", "name": "a"}}]},
            [{"op": "test", "path": "/spec"}],
            "operation test",
        ),
        ({"resources": ["service.yaml", "service.yaml"]}, None, "two objects of one name"),
    ],
)
def test_what_only_real_kustomize_knows_is_refused(
    tmp_path: Path, kustomization: dict[str, Any], patch: Any, told: str
) -> None:
    whole = {"namespace": "n", "resources": ["service.yaml"], "patches": [{"path": "patch.yaml"}] if patch else []}
    service = {"kind": "Service", "metadata": {"name": "a"}}
    for name, content in (("kustomization", whole | kustomization), ("service", service), ("patch", patch)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        build(tmp_path)
