"""A worker compiles whatever its steps launch before the first one: in between, everybody would wait for seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("mode", ["balanced", "deterministic"])
def test_no_step_finds_a_kernel_that_is_not_compiled(mode: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.steady_steps", str(tmp_path), mode],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert any("paged_attention" in name for name in told["before"])
    assert told["while_serving"] == []
