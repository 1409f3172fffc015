"""Pods as a cloud, over an API server that fails as real ones do."""

from collections.abc import Iterator

import pytest

from pdserve.cluster.k8s.client import KubeClient
from pdserve.cluster.k8s.cloud import PodCloud, refuse_flips
from pdserve.cluster.k8s.target import Target
from pdserve.core.endpoint import Role
from pdserve.core.errors import Conflict, Denied, Unavailable, Unsupported
from pdserve.scaler.decision import Replicas
from tests.clocks import ManualClock
from tests.unit.cluster.k8s.api_server import ApiServer, pod, serving, unschedulable
from tests.unit.scaler.policies import policy

TARGETS = {Role.PREFILL: Target("StatefulSet", "prefill"), Role.DECODE: Target("Deployment", "decode")}


class Bench:
    def __init__(self, api: ApiServer, kube: KubeClient) -> None:
        self.api = api
        self.clock = ManualClock()
        self.leads = True
        self.cloud = PodCloud(kube, TARGETS, self.clock, lambda: self.leads)
        for resource, name in (("statefulsets", "prefill"), ("deployments", "decode")):
            api.add_scale(resource, name, 1)
        api.pods = [pod("prefill-0", "prefill"), pod("decode-x", "decode")]

    @property
    def prefill(self) -> Replicas:
        return self.cloud.pools()[Role.PREFILL]


@pytest.fixture
def bench() -> Iterator[Bench]:
    with serving() as (api, kube):
        yield Bench(api, kube)


async def test_it_begins_with_the_pods_as_they_are(bench: Bench) -> None:
    assert bench.prefill == Replicas()
    await bench.cloud.look()
    assert bench.prefill == bench.cloud.pools()[Role.DECODE] == Replicas(wanted=1, ready=1)
    assert bench.cloud.pools()[Role.UNIFIED] == Replicas()


async def test_an_exhausted_cluster_does_not_count_as_engines_that_come(bench: Bench) -> None:
    await bench.cloud.scale(Role.PREFILL, 3, ())
    assert bench.api.replicas("statefulsets", "prefill") == 3
    await bench.cloud.look()
    assert bench.prefill == Replicas(wanted=3, ready=1, warming=2)
    bench.api.pods += [unschedulable("prefill-1", "prefill"), unschedulable("prefill-2", "prefill")]
    await bench.cloud.look()
    assert bench.prefill == Replicas(wanted=3, ready=1, warming=0)


async def test_pods_a_quota_keeps_from_being_made_are_not_waited_for(bench: Bench) -> None:
    await bench.cloud.scale(Role.PREFILL, 3, ())
    await bench.clock.advance(11)
    await bench.cloud.look()
    assert bench.prefill == Replicas(wanted=3, ready=1, warming=0)


async def test_a_conflict_is_tried_again_a_few_times(bench: Bench) -> None:
    bench.api.failures["patch"] = [409, 422]
    await bench.cloud.scale(Role.PREFILL, 2, ())
    assert bench.api.replicas("statefulsets", "prefill") == 2
    bench.api.failures["patch"] = [409, 409, 409]
    with pytest.raises(Conflict):
        await bench.cloud.scale(Role.PREFILL, 4, ())
    assert bench.prefill.wanted == 2


async def test_when_the_server_is_away_the_last_counts_stand(bench: Bench) -> None:
    await bench.cloud.look()
    bench.api.failures["get"] = [503]
    with pytest.raises(Unavailable):
        await bench.cloud.look()
    assert bench.prefill == Replicas(wanted=1, ready=1)
    bench.api.failures["list"] = [403]
    with pytest.raises(Denied, match="listing pods is not allowed"):
        await bench.cloud.look()


async def test_who_does_not_lead_changes_nothing(bench: Bench) -> None:
    bench.leads = False
    with pytest.raises(Unavailable, match="another scaler may lead"):
        await bench.cloud.scale(Role.PREFILL, 2, ())
    assert not any(right.verb == "patch" for right in bench.api.asked)


async def test_engines_in_pods_keep_their_role(bench: Bench) -> None:
    with pytest.raises(Unsupported, match="keeps its pool's role"):
        await bench.cloud.flip("prefill-0", Role.DECODE)
    with pytest.raises(Unsupported, match="nothing is configured to hold unified engines"):
        await bench.cloud.scale(Role.UNIFIED, 1, ())
    assert refuse_flips(policy()) == ""
    assert refuse_flips(policy(flip={"enabled": True})).startswith("flip.enabled: an engine in a pod")
