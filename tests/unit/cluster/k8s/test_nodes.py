"""Ray nodes that follow engines: enough for all of them, and none leaves with one on it."""

from collections.abc import Iterator, Mapping

import pytest
from structlog.testing import capture_logs

from pdserve.cluster.k8s.client import KubeClient
from pdserve.cluster.k8s.nodes import NodedCloud
from pdserve.cluster.k8s.target import Target
from pdserve.cluster.member import Member, Phase
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.scaler.decision import Replicas
from tests.unit.cluster.k8s.api_server import ApiServer, Json, pod, serving, unschedulable


class Engines:
    """A supervisor's, by id; what is asked of it comes true when the test says so."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.victims: tuple[str, ...] = ()

    def place(self, engine_id: str, role: Role, ip: str, phase: Phase = Phase.READY) -> None:
        address = f"{ip}:9000" if ip else ""
        self.members[engine_id] = Member(id=engine_id, role=role, phase=phase, address=address)

    def pools(self) -> Mapping[Role, Replicas]:
        wanted = {role: sum(each.role is role for each in self.members.values()) for role in Role}
        ready = {r: sum(m.role is r and m.phase is Phase.READY for m in self.members.values()) for r in Role}
        return {r: Replicas(wanted=wanted[r], ready=ready[r], warming=wanted[r] - ready[r]) for r in Role}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        self.victims = victims
        for number in range(len(self.members), len(self.members) + engines - self.pools()[role].wanted):
            self.place(f"{role}-new-{number}", role, "", Phase.STARTING)

    async def flip(self, engine_id: str, role: Role) -> None:
        self.place(engine_id, role, self.members[engine_id].address.partition(":")[0])


class Bench:
    """Two prefill engines on nodes 0 and 1 of their StatefulSet, a decode engine on a worker of a RayCluster."""

    def __init__(self, api: ApiServer, kube: KubeClient) -> None:
        self.api = api
        self.engines = Engines()
        targets = {Role.PREFILL: Target("StatefulSet", "p"), Role.DECODE: Target("RayCluster", "ray", "d")}
        self.cloud = NodedCloud(self.engines, lambda: self.engines.members, kube, targets)
        api.add_scale("statefulsets", "p", 2)
        api.add_ray_cluster("ray", d=1)
        api.pods = [pod("p-0", "p", ip="10.0.0.1"), pod("p-1", "p", ip="10.0.0.2"), worker("ray-d-a", "10.0.1.1")]
        self.engines.place("prefill-0", Role.PREFILL, "10.0.0.1")
        self.engines.place("prefill-1", Role.PREFILL, "10.0.0.2")
        self.engines.place("decode-0", Role.DECODE, "10.0.1.1")

    @property
    def nodes(self) -> tuple[int, int]:
        groups = self.api.objects["rayclusters", "ray"]["spec"]["workerGroupSpecs"]
        return self.api.replicas("statefulsets", "p"), groups[0]["replicas"]


def worker(name: str, ip: str) -> Json:
    made = pod(name, "", ip=ip)
    made["metadata"]["labels"] = {"ray.io/cluster": "ray", "ray.io/group": "d"}
    return made


@pytest.fixture
def bench() -> Iterator[Bench]:
    with serving() as (api, kube):
        yield Bench(api, kube)


async def test_engines_that_are_there_change_nothing(bench: Bench) -> None:
    await bench.cloud.look()
    assert bench.nodes == (2, 1)
    assert not any(right.verb == "patch" for right in bench.api.asked)


async def test_new_engines_bring_nodes_and_those_without_a_machine_are_not_warming(bench: Bench) -> None:
    await bench.cloud.look()
    await bench.cloud.scale(Role.PREFILL, 4, ())
    assert bench.nodes == (4, 1)
    assert bench.cloud.pools()[Role.PREFILL] == Replicas(wanted=4, ready=2, warming=2)
    bench.api.pods += [pod("p-2", "p", ip="10.0.0.3"), unschedulable("p-3", "p")]
    await bench.cloud.look()
    assert bench.cloud.pools()[Role.PREFILL] == Replicas(wanted=4, ready=2, warming=1)


async def test_engines_of_the_highest_nodes_leave_and_a_node_only_when_its_engine_is_gone(bench: Bench) -> None:
    await bench.cloud.look()
    await bench.cloud.scale(Role.PREFILL, 1, ("prefill-0", "prefill-1"))
    assert bench.engines.victims == ("prefill-1", "prefill-0")
    bench.engines.place("prefill-1", Role.PREFILL, "10.0.0.2", Phase.DRAINING)
    await bench.cloud.look()
    assert bench.nodes == (2, 1), "its engine drains"
    bench.engines.place("prefill-1", Role.PREFILL, "10.0.0.2", Phase.STOPPED)
    await bench.cloud.look()
    assert bench.nodes == (1, 1)


async def test_a_node_below_an_engine_stays(bench: Bench) -> None:
    bench.engines.place("prefill-0", Role.PREFILL, "10.0.0.1", Phase.STOPPED)
    await bench.cloud.look()
    assert bench.nodes == (2, 1), "the StatefulSet would take the node with the engine"


@pytest.mark.parametrize(("ip", "nodes"), [("10.0.0.2", 2), ("10.0.0.3", 3)])
async def test_a_stateful_set_loses_no_node_while_an_engine_starts_on_any_of_them(
    bench: Bench, ip: str, nodes: int
) -> None:
    bench.api.pods.append(pod("p-2", "p", ip="10.0.0.3"))
    bench.api.add_scale("statefulsets", "p", 3)
    bench.engines.place("prefill-1", Role.PREFILL, "10.0.0.2", Phase.STOPPED)
    bench.engines.place("prefill-2", Role.PREFILL, "", Phase.STARTING)
    await bench.cloud.look()
    assert bench.nodes == (3, 1), "nobody knows whether it starts on p-1 or p-2"
    bench.engines.place("prefill-2", Role.PREFILL, ip)
    await bench.cloud.look()
    assert bench.nodes == (nodes, 1)


async def test_a_ray_cluster_loses_no_worker_while_an_engine_starts_and_then_the_idle_one(bench: Bench) -> None:
    bench.api.pods += [worker("ray-d-b", "10.0.1.2"), worker("ray-d-c", "10.0.1.3")]
    bench.api.add_ray_cluster("ray", d=3)
    bench.engines.place("decode-1", Role.DECODE, "10.0.1.2", Phase.STOPPED)
    bench.engines.place("decode-2", Role.DECODE, "", Phase.STARTING)
    await bench.cloud.look()
    assert bench.nodes == (2, 3)
    bench.engines.place("decode-2", Role.DECODE, "10.0.1.3")
    await bench.cloud.look()
    assert bench.nodes == (2, 2)
    (group,) = bench.api.objects["rayclusters", "ray"]["spec"]["workerGroupSpecs"]
    assert group["scaleStrategy"] == {"workersToDelete": ["ray-d-b"]}


@pytest.mark.parametrize("phase", [Phase.KILLED, Phase.DOWN])
async def test_an_engine_that_does_not_start_in_time_keeps_one_node_only(bench: Bench, phase: Phase) -> None:
    bench.api.pods.append(pod("p-2", "p", ip="10.0.0.3"))
    bench.api.add_scale("statefulsets", "p", 3)
    bench.engines.place("prefill-1", Role.PREFILL, "", Phase.STARTING)
    await bench.cloud.look()
    assert bench.nodes == (3, 1)
    bench.engines.place("prefill-1", Role.PREFILL, "", phase)
    await bench.cloud.look()
    assert bench.nodes == (2, 1)


async def test_an_engine_that_died_keeps_a_node(bench: Bench) -> None:
    bench.engines.place("decode-0", Role.DECODE, "10.0.1.1", Phase.DOWN)
    await bench.cloud.look()
    assert bench.nodes == (2, 1)


async def test_an_engine_that_took_another_role_keeps_the_node_it_is_on(bench: Bench) -> None:
    await bench.cloud.look()
    await bench.cloud.flip("prefill-1", Role.DECODE)
    await bench.cloud.look()
    assert bench.nodes == (2, 1)
    bench.engines.place("prefill-1", Role.DECODE, "", Phase.STARTING)
    await bench.cloud.look()
    assert bench.nodes == (1, 2), "once it starts anew it needs a node of its role"


async def test_of_a_ray_cluster_the_idle_worker_is_named(bench: Bench) -> None:
    bench.api.pods.append(worker("ray-d-b", "10.0.1.2"))
    bench.api.add_ray_cluster("ray", d=2)
    await bench.cloud.look()
    assert bench.nodes == (2, 1)
    (group,) = bench.api.objects["rayclusters", "ray"]["spec"]["workerGroupSpecs"]
    assert group["scaleStrategy"] == {"workersToDelete": ["ray-d-b"]}


async def test_what_is_denied_is_said_once_and_tried_again(bench: Bench) -> None:
    await bench.cloud.look()
    bench.api.failures["patch"] = [403, 403, 403]
    with pytest.raises(Exception, match="scaling StatefulSet/p is not allowed"):
        await bench.cloud.scale(Role.PREFILL, 3, ())
    with capture_logs() as logs:
        await bench.cloud.look()
        await bench.cloud.look()
        await bench.cloud.look()
    assert [line["event"] for line in logs if line["log_level"] == "error"] == [
        "the number of Ray nodes does not follow"
    ]
    assert bench.nodes == (3, 1)


async def test_nodes_that_cannot_be_seen_are_not_changed(bench: Bench) -> None:
    bench.api.failures["list"] = [503]
    with pytest.raises(Unavailable):
        await bench.cloud.look()
    assert bench.nodes == (2, 1)


def test_groups_of_pods_are_no_ray_nodes(bench: Bench) -> None:
    with (
        serving() as (_, kube),
        pytest.raises(ConfigError, match="a LeaderWorkerSet holds engines, which `pdserve scale` scales"),
    ):
        NodedCloud(bench.engines, dict, kube, {Role.PREFILL: Target("LeaderWorkerSet", "p")})
