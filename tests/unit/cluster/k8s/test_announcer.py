"""Events of decisions: what they say, and how many there can be."""

import asyncio
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from pdserve.cluster.k8s.announcer import Announcer
from pdserve.cluster.k8s.client import KubeClient
from pdserve.cluster.k8s.target import Held, Target
from pdserve.core.endpoint import Role
from pdserve.core.errors import Denied
from pdserve.core.tasks import end
from pdserve.scaler.decision import Action, Decision, Scale, SetBypass
from tests.clocks import ManualClock
from tests.unit.cluster.k8s.api_server import ApiServer, serving

HELD = {Role.PREFILL: Held(replicas=2, selector="", uid="uid-prefill")}


class Bench:
    def __init__(self, api: ApiServer, kube: KubeClient) -> None:
        self.api = api
        self.clock = ManualClock()
        targets = {Role.PREFILL: Target("StatefulSet", "prefill"), Role.DECODE: Target("RayCluster", "ray", "decode")}
        self.announcer = Announcer(kube, targets, "scaler-0", self.clock)

    def offer(self, action: Action, failure: Denied | None = None) -> None:
        inputs = {"backlog": 1.53, "ready": 2.0}
        decision = Decision(at=0.0, action=action, rule="backlog", reason="3 engines are right", inputs=inputs)
        self.announcer.offer(decision, failure, HELD)

    async def write(self, events: int) -> None:
        """Until so many are there, and a while longer."""
        task = asyncio.create_task(self.announcer.run())
        async with asyncio.timeout(20):
            while len(self.api.events) < events:
                await self.clock.advance(1)
                await asyncio.sleep(0.005)
        await self.clock.advance(60)
        await end([task])


@pytest.fixture
def bench() -> Iterator[Bench]:
    with serving() as (api, kube):
        yield Bench(api, kube)


def up(engines: int) -> Scale:
    return Scale(role=Role.PREFILL, engines=engines, before=2)


async def test_an_event_says_what_why_and_by_which_figures(bench: Bench) -> None:
    bench.offer(up(3))
    bench.offer(SetBypass(below=128, before=0))
    bench.offer(Scale(role=Role.DECODE, engines=1, before=2), Denied("scaling RayCluster/ray/decode is not allowed"))
    await bench.write(3)
    scaled, bypass, failed = bench.api.events
    assert (scaled["reason"], scaled["type"]) == ("ScaledUp", "Normal")
    words = "prefill from 2 to 3 engines; backlog: 3 engines are right (backlog 1.53, ready 2)"
    assert scaled["message"] == words
    assert scaled["involvedObject"] == {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": "prefill",
        "namespace": "test",
        "uid": "uid-prefill",
    }
    assert bypass["reason"] == "BypassChanged"
    assert (failed["reason"], failed["type"]) == ("ScalingFailed", "Warning")
    assert failed["involvedObject"]["kind"] == "RayCluster"
    assert "failed: scaling RayCluster/ray/decode is not allowed" in failed["message"]


async def test_of_very_many_the_latest_are_told(bench: Bench) -> None:
    for engines in range(3, 33):
        bench.offer(up(engines))
    await bench.write(16)
    assert len(bench.api.events) == 16
    first, *_, last = [event["message"] for event in bench.api.events]
    assert first.startswith("(14 earlier ones left out) prefill from 2 to 17 engines")
    assert last.startswith("prefill from 2 to 32 engines")


async def test_one_that_may_not_be_written_ends_nothing(bench: Bench) -> None:
    bench.api.failures["create"] = [403, 403]
    for engines in (3, 4, 5):
        bench.offer(up(engines))
    with capture_logs() as logs:
        await bench.write(1)
    assert [line["event"] for line in logs] == ["decisions are not told as Events"]
    assert "to 5 engines" in bench.api.events[0]["message"]


async def test_what_fails_again_and_again_is_told_once_a_minute(bench: Bench) -> None:
    for _ in range(50):
        bench.offer(up(3), Denied("scaling is not allowed"))
        await bench.clock.advance(2)
    bench.offer(up(3))
    await bench.write(3)
    assert [event["reason"] for event in bench.api.events] == ["ScalingFailed", "ScalingFailed", "ScaledUp"]
