"""A deployment on a Ray cluster it has joined outlives the loss of a node, whether the node dies or hangs."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.processes import is_gone
from tests.deployment import Deployment, deployed, write_config
from tests.flows.test_ray import mode, returned, settings
from tests.ray_nodes import HEAD, RayNodes, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

DETECTED = 10.0
"""Seconds from the loss of a node to the order to start its engine elsewhere: about 2 on an idle machine with the
settings of ray_nodes, 15 with Ray's own."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path, "127.0.0.3", "127.0.0.4") as started:
        yield started


@pytest.fixture
def deployment(nodes: RayNodes, tmp_path: Path) -> Iterator[Deployment]:
    joined = {"address": nodes.address, "node_ip": HEAD, "auth_token_file": str(nodes.token_file)}
    config = write_config(tmp_path / "cluster.yaml", settings(tmp_path, ray=joined))
    with deployed(tmp_path / "log", str(config), "--launcher", "ray") as running:
        yield running


def away_from_the_head(deployment: Deployment) -> tuple[str, str]:
    """An engine on a node that may be lost, and the node's address."""
    for id, engine in deployment.engines().items():
        ip = engine["address"].rpartition(":")[0]
        if ip != HEAD:
            return id, ip
    raise AssertionError("nodes of one CPU each cannot hold two engines")


def test_an_engine_of_a_killed_node_ends_and_returns_on_another(nodes: RayNodes, deployment: Deployment) -> None:
    victim, ip = away_from_the_head(deployment)
    before = deployment.engines()[victim]
    os.kill(nodes.raylet(ip), signal.SIGKILL)
    assert is_gone(before["pid"], within=5)
    deployment.eventually(lambda: deployment.engines()[victim]["epoch"] != before["epoch"], within=DETECTED)
    deployment.eventually(returned(deployment, victim, before))
    assert deployment.engines()[victim]["address"].rpartition(":")[0] != ip
    deployment.eventually(deployment.is_ready)
    assert mode(deployment, "first") == "disaggregated"


def test_an_engine_that_outlives_its_node_is_replaced_and_no_longer_believed(
    nodes: RayNodes, deployment: Deployment
) -> None:
    victim, ip = away_from_the_head(deployment)
    before = deployment.engines()[victim]
    raylet = nodes.raylet(ip)
    os.kill(raylet, signal.SIGSTOP)
    deployment.eventually(lambda: deployment.engines()[victim]["epoch"] != before["epoch"], within=DETECTED)
    deployment.eventually(returned(deployment, victim, before))
    deployment.eventually(deployment.is_ready)
    after = deployment.engines()[victim]
    assert after["pid"] != before["pid"]
    assert mode(deployment, "first") == "disaggregated"
    assert not is_gone(before["pid"], within=0), "the case under test is an engine that lives on"
    os.kill(raylet, signal.SIGCONT)
    assert is_gone(before["pid"], within=10)
    time.sleep(1.0)  # its last words must not disturb its successor
    assert deployment.engines()[victim]["epoch"] == after["epoch"]
    assert mode(deployment, "second") == "disaggregated"
