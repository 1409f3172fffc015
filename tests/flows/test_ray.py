"""`pdserve serve --launcher ray` as a user runs it: a cluster of its own, a lost engine, nothing left behind."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.contract.processes import is_gone, parent_of
from tests.deployment import Deployment, deployed, write_config

LONG = "the other nation is here and there on the road to ruin " * 4


def settings(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(make_checkpoint(directory / "model", "qwen3")),
        "served_model_name": "tiny",
        "device": "cpu",
        "kv": {"memory": "8MiB"},
        "times": {"drain_timeout": 20},
        **more,
    }


def mode(deployment: Deployment, opening: str) -> str:
    """How a prompt is served; one that is repeated may be in the decode engine's cache."""
    response = deployment.complete(f"{opening}: {LONG}")
    assert response.status_code == 200, response.text
    return str(response.json()["pdserve"]["mode"])


def returned(deployment: Deployment, victim: str, before: dict[str, Any]) -> Callable[[], bool]:
    """Whether an engine is ready again under a new epoch."""

    def check() -> bool:
        now = deployment.engines()[victim]
        return bool(now["state"] == "ready" and now["epoch"] != before["epoch"])

    return check


def test_engines_in_ray_serve_come_back_and_leave_nothing_behind(tmp_path: Path) -> None:
    config = write_config(tmp_path / "cluster.yaml", settings(tmp_path))
    with deployed(tmp_path / "log", str(config), "--launcher", "ray") as deployment:
        before = deployment.engines()
        assert all(engine["address"].startswith("127.0.0.2:") for engine in before.values())
        assert mode(deployment, "first") == "disaggregated"

        os.kill(before["decode-0"]["pid"], signal.SIGKILL)
        deployment.eventually(returned(deployment, "decode-0", before["decode-0"]))
        os.kill(parent_of(before["prefill-0"]["pid"]), signal.SIGKILL)
        deployment.eventually(returned(deployment, "prefill-0", before["prefill-0"]))
        deployment.eventually(deployment.is_ready)
        assert mode(deployment, "second") == "disaggregated"

        children = deployment.children()
        assert {engine["pid"] for engine in deployment.engines().values()} <= set(children)
        deployment.signal(signal.SIGTERM)
        assert deployment.wait() == 0
        assert [pid for pid in children if not is_gone(pid, within=5)] == []
    # Ray's own handler would say this, and abort the process after three seconds, whatever still drains.
    assert "SIGTERM received" not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["head", "raylet"])
def test_a_lost_ray_cluster_of_our_own_is_replaced(tmp_path: Path, lost: str) -> None:
    config = write_config(tmp_path / "cluster.yaml", settings(tmp_path))
    with deployed(tmp_path / "log", str(config), "--launcher", "ray") as deployment:
        before = deployment.engines()
        raylet = parent_of(parent_of(before["decode-0"]["pid"]))
        os.kill(parent_of(raylet) if lost == "head" else raylet, signal.SIGKILL)
        for id, engine in before.items():
            assert is_gone(engine["pid"], within=5)
            deployment.eventually(returned(deployment, id, engine), within=60)
        deployment.eventually(deployment.is_ready)
        assert mode(deployment, "third") == "disaggregated"
