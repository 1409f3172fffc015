"""What reaches an API server, by which rights, and what its failures become."""

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.k8s.client import KubeClient, open_client
from pdserve.cluster.k8s.rights import NODE_RIGHTS, SCALER_RIGHTS, Right
from pdserve.cluster.k8s.target import Target
from pdserve.core.errors import ConfigError, Conflict, Denied, PdserveError, Unavailable
from tests.unit.cluster.k8s.api_server import ApiServer, pod, serving

STATEFUL = Target("StatefulSet", "prefill")
DEPLOYMENT = Target("Deployment", "decode")
SPANNING = Target("LeaderWorkerSet", "spanning")
GROUP = Target("RayCluster", "ray", "decode")
LEASE: dict[str, Any] = {"metadata": {"name": "leader"}, "spec": {"holderIdentity": "a"}}


@pytest.fixture
def served() -> Iterator[tuple[ApiServer, KubeClient]]:
    with serving() as (api, kube):
        api.add_scale("statefulsets", "prefill", 1)
        api.add_scale("deployments", "decode", 0)
        api.add_scale("leaderworkersets", "spanning", 3)
        api.add_ray_cluster("ray", other=1, decode=2)
        yield api, kube


async def everything(kube: KubeClient) -> set[str]:
    """Use each method; the names of those used."""
    for target in (STATEFUL, DEPLOYMENT, SPANNING, GROUP):
        found = await kube.look(target)
        await kube.scale(target, 3, place=found.place)
    await kube.pods("pool=prefill")
    assert await kube.lease("leader") is None
    held = await kube.create_lease(LEASE)
    await kube.replace_lease(held)
    await kube.create_event({"metadata": {"generateName": "e."}, "involvedObject": {"kind": "StatefulSet"}})
    return {"look", "scale", "pods", "lease", "create_lease", "replace_lease", "create_event"}


async def test_all_it_ever_asks_is_what_the_rights_name(served: tuple[ApiServer, KubeClient]) -> None:
    api, kube = served
    used = await everything(kube)
    methods = inspect.getmembers(KubeClient, inspect.iscoroutinefunction)
    assert used == {name for name, _ in methods if not name.startswith("_")}, "a method nobody checks the rights of"
    assert api.asked.keys() == SCALER_RIGHTS
    assert {right.resource for right in SCALER_RIGHTS - NODE_RIGHTS} == {"leases", "events"}


async def test_each_kind_is_read_and_scaled(served: tuple[ApiServer, KubeClient]) -> None:
    api, kube = served
    found = {target: await kube.look(target) for target in (STATEFUL, DEPLOYMENT, SPANNING, GROUP)}
    assert {target.kind: each.replicas for target, each in found.items()} == {
        "StatefulSet": 1,
        "Deployment": 0,
        "LeaderWorkerSet": 3,
        "RayCluster": 2,
    }
    assert (found[STATEFUL].selector, found[STATEFUL].uid) == ("pool=prefill", "uid-prefill")
    assert found[SPANNING].selector == "leaderworkerset.sigs.k8s.io/name=spanning", "not its leaders only"
    assert found[GROUP].selector == "ray.io/cluster=ray,ray.io/group=decode"
    for target, each in found.items():
        await kube.scale(target, 5, place=each.place)
    assert api.replicas("statefulsets", "prefill") == api.replicas("deployments", "decode") == 5
    assert api.replicas("leaderworkersets", "spanning") == 5
    other, decode = api.objects["rayclusters", "ray"]["spec"]["workerGroupSpecs"]
    assert (other["replicas"], decode["replicas"]) == (1, 5)
    with pytest.raises(Conflict):
        await kube.scale(GROUP, 4, place=0)
    await kube.scale(GROUP, 4, place=1, leaving=["ray-decode-x"])
    decode = api.objects["rayclusters", "ray"]["spec"]["workerGroupSpecs"][1]
    assert (decode["replicas"], decode["scaleStrategy"]) == (4, {"workersToDelete": ["ray-decode-x"]})


async def test_what_is_not_there_is_said(served: tuple[ApiServer, KubeClient]) -> None:
    api, kube = served
    api.objects["statefulsets", "new"] = {"metadata": {"name": "new"}, "spec": {"replicas": 1}}
    with pytest.raises(Unavailable, match="StatefulSet/new does not say yet which pods are its own"):
        await kube.look(Target("StatefulSet", "new"))
    with pytest.raises(Unavailable, match="RayCluster ray has no worker group nobody"):
        await kube.look(Target("RayCluster", "ray", "nobody"))
    with pytest.raises(Unavailable, match="reading StatefulSet/nothing: statefulsets nothing not found"):
        await kube.look(Target("StatefulSet", "nothing"))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (403, Denied, "scaling StatefulSet/prefill is not allowed; does the Role"),
        (401, Denied, "is not allowed"),
        (409, Conflict, "patch statefulsets of prefill"),
        (422, Conflict, "patch statefulsets of prefill"),
        (429, Unavailable, "answered 429"),
        (503, Unavailable, "answered 503"),
    ],
)
async def test_a_refusal_says_what_was_refused_and_why(
    served: tuple[ApiServer, KubeClient], status: int, kind: type[PdserveError], words: str
) -> None:
    api, kube = served
    api.failures["patch"] = [status]
    with pytest.raises(kind, match=words):
        await kube.scale(STATEFUL, 2)


async def test_a_server_that_does_not_answer_is_given_up_without_holding_anybody_up() -> None:
    with serving(answer=2.0) as (api, kube):
        api.failures["get"] = [0]
        waiting = asyncio.create_task(kube.look(STATEFUL))
        await kube.pods("pool=prefill")
        assert not waiting.done()
        with pytest.raises(Unavailable, match="does not answer"):
            await waiting


async def test_a_lease_changed_meanwhile_is_a_conflict(served: tuple[ApiServer, KubeClient]) -> None:
    _, kube = served
    held = await kube.create_lease(LEASE)
    await kube.replace_lease(held)
    with pytest.raises(Conflict):
        await kube.replace_lease(held)
    with pytest.raises(Conflict):
        await kube.create_lease(LEASE)


async def test_pods_are_those_of_the_selector(served: tuple[ApiServer, KubeClient]) -> None:
    api, kube = served
    api.pods = [pod("prefill-0", "prefill"), pod("decode-0", "decode")]
    assert [each["metadata"]["name"] for each in await kube.pods("pool=prefill")] == ["prefill-0"]


def test_without_a_cluster_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(nothing))
    with pytest.raises(ConfigError, match="run this in a pod with a service account token, or set KUBECONFIG"):
        open_client(None, answer=1.0, env={})
    with pytest.raises(ConfigError, match="no Kubernetes cluster"):
        open_client(None, answer=1.0, env={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


def test_rights_are_written_as_a_role_writes_them() -> None:
    assert Right("apps", "statefulsets/scale", "patch") in SCALER_RIGHTS
