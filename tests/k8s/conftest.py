"""The cluster of KUBECONFIG; without it, a control plane of this run's own, with two nodes that run nothing."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import pytest

from tests.k8s import control_plane as planes
from tests.k8s import kinds
from tests.k8s import nodes as fake
from tests.k8s.binaries import missing
from tests.k8s.cluster import Cluster
from tests.k8s.control_plane import ControlPlane
from tests.k8s.nodes import Nodes


@dataclass(frozen=True)
class Server:
    kubeconfig: str
    plane: ControlPlane | None = None
    nodes: Nodes | None = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if given := os.environ.get("KUBECONFIG"):
        yield Server(given)
        return
    if missing():
        pytest.fail(missing())
    folder: Path = tmp_path_factory.mktemp("control-plane")
    with planes.running(folder) as plane, fake.running(plane.kubeconfig, folder) as nodes:
        yield Server(str(plane.kubeconfig), plane, nodes)


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Iterator[Cluster]:
    """A namespace of the test's own."""
    cluster = Cluster(server.kubeconfig, f"pdserve-test-{token_hex(4)}", tmp_path)
    cluster.create_namespace()
    yield cluster
    cluster.delete_namespace()


@pytest.fixture(scope="session")
def kinds_of_operators(server: Server) -> Iterator[None]:
    """KubeRay's, KEDA's, that of LeaderWorkerSets and those of the Prometheus operator are known."""
    with kinds.defined(server.kubeconfig):
        yield


@pytest.fixture
def control_plane(server: Server) -> ControlPlane:
    """Whose API server may be stopped."""
    if server.plane is None:
        pytest.skip("the API server of KUBECONFIG is not ours to stop")
    return server.plane


@pytest.fixture
def nodes(server: Server) -> Iterator[Nodes]:
    """Whose GPUs may be changed; eight each, afterwards again."""
    if server.nodes is None:
        pytest.skip("the nodes of KUBECONFIG are not ours to change")
    yield server.nodes
    server.nodes.offer_gpus(8)
