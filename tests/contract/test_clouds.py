"""What the scaler may rely on, whoever owns engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pdserve.cluster.cloud import SupervisedCloud
from pdserve.cluster.k8s.cloud import PodCloud
from pdserve.cluster.k8s.nodes import NodedCloud
from pdserve.cluster.k8s.target import Target
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Role
from pdserve.core.errors import PdserveError
from pdserve.scaler.decision import Replicas
from pdserve.scaler.runner import Cloud
from tests.unit.cluster.k8s.api_server import serving
from tests.unit.cluster.test_supervisor import process, supervised

ROLES = (Role.PREFILL, Role.DECODE)


class Given:
    """A cloud, and what its loop does before each decision."""

    def __init__(self, cloud: Cloud, look: Callable[[], object]) -> None:
        self.cloud = cloud
        self._look = look

    async def settles(self, role: Role, replicas: Replicas) -> None:
        async with asyncio.timeout(60):
            while True:
                if asyncio.iscoroutine(looking := self._look()):
                    await looking
                if self.cloud.pools()[role] == replicas:
                    return
                await asyncio.sleep(0.05)


def targets(kind: str) -> dict[Role, Target]:
    return {role: Target(kind, role.value) for role in ROLES}


@asynccontextmanager
async def of_processes() -> AsyncIterator[Given]:
    async with supervised(*(process(f"{role}-0", role) for role in ROLES)) as engines:
        yield Given(SupervisedCloud(engines.supervisor, process), lambda: None)


@asynccontextmanager
async def of_pods() -> AsyncIterator[Given]:
    with serving() as (api, kube):
        api.makes_pods = True
        for role in ROLES:
            api.add_scale("statefulsets", role.value, 1)
        cloud = PodCloud(kube, targets("StatefulSet"), SystemClock(), lambda: True)
        yield Given(cloud, cloud.look)


@asynccontextmanager
async def of_groups() -> AsyncIterator[Given]:
    with serving() as (api, kube):
        api.makes_pods = True
        for role in ROLES:
            api.add_scale("leaderworkersets", role.value, 1)
        cloud = PodCloud(kube, targets("LeaderWorkerSet"), SystemClock(), lambda: True)
        yield Given(cloud, cloud.look)


@asynccontextmanager
async def of_processes_on_nodes() -> AsyncIterator[Given]:
    async with supervised(*(process(f"{role}-0", role) for role in ROLES)) as engines:
        with serving() as (api, kube):
            api.makes_pods = True
            for role in ROLES:
                api.add_scale("statefulsets", role.value, 1)
            own = SupervisedCloud(engines.supervisor, process)
            cloud = NodedCloud(own, lambda: engines.supervisor.members, kube, targets("StatefulSet"))
            yield Given(cloud, cloud.look)


@pytest.fixture(params=[of_processes, of_pods, of_groups, of_processes_on_nodes])
async def given(request: pytest.FixtureRequest) -> AsyncIterator[Given]:
    async with request.param() as given:
        for role in ROLES:
            await given.settles(role, Replicas(wanted=1, ready=1))
        yield given


async def test_it_knows_every_role(given: Given) -> None:
    assert given.cloud.pools().keys() == set(Role)
    assert given.cloud.pools()[Role.UNIFIED] == Replicas()


async def test_a_pool_grows_and_shrinks_and_the_other_stays(given: Given) -> None:
    await given.cloud.scale(Role.PREFILL, 3, ())
    assert given.cloud.pools()[Role.PREFILL].wanted == 3, "what is asked for is wanted at once"
    await given.settles(Role.PREFILL, Replicas(wanted=3, ready=3))
    await given.cloud.scale(Role.PREFILL, 2, ("prefill-1",))
    assert given.cloud.pools()[Role.PREFILL] == Replicas(wanted=2, ready=2)
    await given.settles(Role.PREFILL, Replicas(wanted=2, ready=2))
    await given.settles(Role.DECODE, Replicas(wanted=1, ready=1))


async def test_a_pool_sleeps_and_wakes(given: Given) -> None:
    await given.cloud.scale(Role.DECODE, 0, ())
    await given.settles(Role.DECODE, Replicas())
    await given.cloud.scale(Role.DECODE, 1, ())
    await given.settles(Role.DECODE, Replicas(wanted=1, ready=1))


async def test_the_same_number_again_changes_nothing(given: Given) -> None:
    before = dict(given.cloud.pools())
    await given.cloud.scale(Role.PREFILL, 1, ())
    assert given.cloud.pools() == before


async def test_an_engine_that_is_not_there_is_not_flipped(given: Given) -> None:
    with pytest.raises(PdserveError):
        await given.cloud.flip("prefill-9", Role.DECODE)
