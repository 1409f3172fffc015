"""What kustomize makes of deploy/k8s is what the chart renders."""

import shutil
import subprocess
from typing import Any

import pytest
import yaml

from deploy.chart import Manifest
from deploy.generate import K8S, NAMESPACE, overlays, plain

FOLDERS: dict[str, dict[str, Any]] = {"base": {}, **{f"overlays/{name}": made for name, made in overlays().items()}}


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which brings kustomize, is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_builds_what_the_chart_renders(folder: str) -> None:
    ran = subprocess.run(["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    built = by_name(list(yaml.safe_load_all(ran.stdout)))
    for manifest in built.values():
        assert manifest["metadata"].pop("namespace") == NAMESPACE
    assert built == by_name(plain(FOLDERS[folder]))
