"""A gang on a Ray cluster that was joined: each member on a node of its own, and all end when a node is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.contract.launched_program import MISSED
from tests.contract.processes import is_gone
from tests.ray_nodes import HEAD, RayNodes, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

OTHER = "127.0.0.3"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path, OTHER) as started:
        yield started


@contextmanager
def launching(nodes: RayNodes, placed: str) -> Iterator[subprocess.Popen[str]]:
    told = [nodes.address, HEAD, str(nodes.token_file), placed, OTHER]
    command = [sys.executable, "-m", "tests.contract.spread_program", *told]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=nodes.env) as program:
        try:
            yield program
        finally:
            program.kill()


def said_by(program: subprocess.Popen[str]) -> dict[str, Any]:
    """Its next line; Ray says on stdout too that a node is lost."""
    assert program.stdout is not None
    line = next(line for line in program.stdout if line.startswith("{"))
    said: dict[str, Any] = json.loads(line)
    return said


@pytest.mark.parametrize(
    ("lost", "leader_at", "follower_at", "code"),
    [("follower", HEAD, OTHER, MISSED), ("leader", OTHER, HEAD, -signal.SIGKILL)],
)
def test_members_are_on_nodes_of_their_own_and_end_when_one_is_lost(
    nodes: RayNodes, lost: str, leader_at: str, follower_at: str, code: int
) -> None:
    with launching(nodes, placed=lost) as program:
        facts = said_by(program)
        follower, _, at = facts["followers"].partition("@")
        assert facts["door"].rpartition(":")[0] == leader_at
        assert at == follower_at
        os.kill(nodes.raylet(OTHER), signal.SIGKILL)
        assert is_gone(facts["pid"], within=10)
        assert is_gone(int(follower), within=10)
        assert said_by(program) == {"code": code, "left": []}
