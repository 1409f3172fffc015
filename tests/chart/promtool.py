"""Prometheus's own tool, which evaluates rules over series that a test gives it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

_BUILT = Path(__file__).parents[2] / "build" / "promtool"


def promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it. Where it is missing a test is skipped, in CI it fails."""
    found = shutil.which("promtool") or (str(_BUILT) if _BUILT.exists() else None)
    if found is None:
        told = "promtool is missing: `make build/promtool` fetches it from Debian, or install the package prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    return subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=False)


def try_rules(folder: Path, rules: dict[str, Any], tests: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """`promtool test rules` of rules and of tests in its format."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    suite = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return promtool("test", "rules", str(folder / "tests.yaml"))
