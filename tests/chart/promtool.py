"""Prometheus's own tool, which evaluates rules over series that a test gives it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

BUILD = Path(__file__).parents[2] / "build"
"""Where `make build/promtool` unpacks Debian's package."""


def missing(program: str) -> NoReturn:
    """Skips the test, and fails it in CI."""
    told = f"{program} is missing: `make build/promtool` fetches it from Debian, or install the package prometheus"
    if os.environ.get("CI"):
        pytest.fail(told)
    pytest.skip(told)


def promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run it."""
    built = BUILD / "promtool"
    found = shutil.which("promtool") or (str(built) if built.exists() else missing("promtool"))
    return subprocess.run([found, *arguments], capture_output=True, text=True, timeout=60, check=False)


def try_rules(folder: Path, rules: dict[str, Any], tests: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    """`promtool test rules` of rules and of tests in its format."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    suite = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return promtool("test", "rules", str(folder / "tests.yaml"))
