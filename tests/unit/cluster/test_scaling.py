"""The scaler behind the registry's address: what gateways tell it and hear, and how it follows its file."""

import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from pdserve.cluster.registry import Registry
from pdserve.cluster.scaling import Scaling, explain_scaling, report_demand
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError, Denied, Unavailable
from pdserve.core.tasks import running
from pdserve.scaler.decision import Replicas
from pdserve.scaler.demand import Demand, together
from pdserve.scaler.policy import Policy
from tests.clocks import ManualClock
from tests.unit.scaler.policies import demand, first, prompts

POLICY = "interval: 5\npools: {prefill: {max: 8, forecast: {kind: none}}, decode: {max: 8, forecast: {kind: none}}}\n"


class Pools:
    """A cloud that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Role, int]] = []

    def pools(self) -> Mapping[Role, Replicas]:
        return {role: Replicas(wanted=2, ready=2) for role in (Role.PREFILL, Role.DECODE)}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        self.asked.append((role, engines))

    async def flip(self, engine_id: str, role: Role) -> None:
        raise AssertionError("no flip is enabled")


class Bench:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.cloud = Pools()
        self.clock = ManualClock()
        self.scaling = Scaling(path, self.cloud, self.clock)
        self.registry = Registry()
        self.registry.add(self.scaling.register)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY)
    bench = Bench(path)
    await bench.registry.start()
    yield bench
    await bench.registry.stop()


async def test_a_report_travels_whole_and_is_answered_with_orders_and_figures(bench: Bench) -> None:
    sent = demand(arrivals=3, prompts=prompts(3, 0.5), first_tokens=(first(0.3),), tpots=(0.05,), backlog=0.5)
    orders, figures = await report_demand(bench.registry.address, "g", sent)
    assert (orders.bypass_below, orders.patience) == (0, 0.0)
    assert figures.pools == ()
    assert bench.scaling.heard() == sent


async def test_reports_of_one_gateway_follow_each_other_and_those_of_several_add_up(bench: Bench) -> None:
    for gateway, arrivals in (("a", 3), ("a", 4), ("b", 10)):
        await report_demand(bench.registry.address, gateway, demand(seconds=1.0, arrivals=arrivals))
    heard = bench.scaling.heard()
    assert heard
    assert (heard.seconds, heard.arrivals, len(heard.engines)) == (2.0, 17, 4)
    assert together([]) is None


async def test_of_several_addresses_behind_a_name_the_one_that_listens_is_told(bench: Bench) -> None:
    """Scalers that stand by do not listen."""
    port = bench.registry.address.rpartition(":")[2]
    await report_demand(f"ipv4:127.0.0.2:{port},127.0.0.3:{port},{bench.registry.address}", "g", demand(arrivals=3))
    heard = bench.scaling.heard()
    assert heard
    assert heard.arrivals == 3


async def test_it_decides_on_what_it_has_heard_and_tells_why(bench: Bench) -> None:
    await report_demand(bench.registry.address, "g", demand(backlog=1.5, kv=0.6))
    await bench.scaling.look()
    assert bench.cloud.asked == [(Role.PREFILL, 3)]
    _, figures = await report_demand(bench.registry.address, "g", demand())
    assert figures.decisions == (("scale", "backlog", 1),)
    assert [pool.role for pool in figures.pools] == ["prefill", "decode"]
    told = json.loads(await explain_scaling(bench.registry.address))
    assert told["decisions"][0]["what"] == "prefill from 2 to 3 engines"


async def test_without_a_word_from_a_gateway_nothing_is_decided(bench: Bench) -> None:
    await bench.scaling.look()
    assert bench.cloud.asked == []
    assert json.loads(await explain_scaling(bench.registry.address))["pools"] == []


async def test_a_changed_policy_is_taken_and_a_wrong_one_refused(bench: Bench) -> None:
    bench.path.write_text(POLICY.replace("max: 8", "max: 8, min: 5", 1))
    await report_demand(bench.registry.address, "g", demand(kv=0.6, backlog=0.7))
    await bench.scaling.look()
    assert bench.cloud.asked == [(Role.PREFILL, 5)]
    bench.path.write_text(POLICY.replace("max: 8", "most: 8", 1))
    with capture_logs() as logs:
        await bench.scaling.look()
        await bench.scaling.look()
    assert [line["log_level"] for line in logs] == ["error"]
    assert (
        "line 2: pools.prefill.most: unknown key"
        in json.loads(await explain_scaling(bench.registry.address))["refusal"]
    )
    _, figures = await report_demand(bench.registry.address, "g", demand())
    assert dict(figures.reloads) == {"ok": 1, "refused": 1}
    assert figures.refused
    bench.path.write_text(POLICY)
    await bench.scaling.look()
    assert not bench.scaling.figures().refused


async def test_a_config_map_that_changes_is_noticed(tmp_path: Path) -> None:
    """As a kubelet writes it: each version lies in a folder of its own, and one link is led from the old to the new."""

    def version(name: str, policy: str) -> None:
        (tmp_path / name).mkdir()
        file = tmp_path / name / "policies.yaml"
        file.write_text(policy)
        os.utime(file, (1, 1))
        (tmp_path / "..data_tmp").symlink_to(name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    version("..2026_1", POLICY)
    path = tmp_path / "policies.yaml"
    path.symlink_to("..data/policies.yaml")
    scaling = Scaling(path, Pools(), ManualClock())
    version("..2026_2", POLICY.replace("max: 8", "max: 9", 1))
    await scaling.look()
    assert scaling.figures().reloads == (("ok", 1),)
    version("..2026_3", POLICY.replace("pools", "polls"))
    await scaling.look()
    assert scaling.figures().refused


def test_a_wrong_policy_is_no_beginning(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text("pools: {}\n")
    with pytest.raises(ConfigError, match="line 1: pools: give prefill and decode"):
        Scaling(path, Pools(), ManualClock())


async def test_a_scaler_that_is_not_there_is_said_to_be_unavailable() -> None:
    registry = Registry()
    await registry.start()
    try:
        with pytest.raises(Unavailable):
            await report_demand(registry.address, "g", Demand(seconds=1.0))
        with pytest.raises(Unavailable):
            await explain_scaling(registry.address)
    finally:
        await registry.stop()


async def test_pools_that_cannot_be_seen_do_not_sleep_for_what_was_asked_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    pool = "{min: 0, max: 8, forecast: {kind: none}}"
    path.write_text(f"scale_to_zero: {{idle: 600}}\npools: {{prefill: {pool}, decode: {pool}}}\n")
    cloud, clock, away = Pools(), ManualClock(), True

    async def see() -> None:
        if away:
            raise Unavailable("the API server does not answer")

    scaling = Scaling(path, cloud, clock, see=see)
    registry = Registry()
    registry.add(scaling.register)
    await registry.start()
    try:
        for _ in range(4):
            await report_demand(registry.address, "g", demand(arrivals=1))
            await scaling.look()
            await clock.advance(200.0)
        away = False
        await report_demand(registry.address, "g", demand())
        await scaling.look()
        assert all(engines > 0 for _, engines in cloud.asked)
    finally:
        await registry.stop()


async def test_what_cannot_be_seen_is_not_decided_on(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY)
    cloud, away = Pools(), [Unavailable("the API server does not answer"), Denied("listing pods is not allowed")]

    async def see() -> None:
        if away:
            raise away[0]

    scaling = Scaling(path, cloud, ManualClock(), see=see)
    registry = Registry()
    registry.add(scaling.register)
    await registry.start()
    try:
        with capture_logs() as logs:
            for _ in range(3):
                await report_demand(registry.address, "g", demand(backlog=1.5, kv=0.6))
                await scaling.look()
            assert json.loads(await explain_scaling(registry.address))["blind"] == "the API server does not answer"
            assert scaling.figures().blind
            away.clear()
            await scaling.look()
            assert cloud.asked == [], "what was told meanwhile is past"
            await report_demand(registry.address, "g", demand(backlog=1.5, kv=0.6))
            await scaling.look()
    finally:
        await registry.stop()
    assert cloud.asked == [(Role.PREFILL, 3)]
    assert not scaling.figures().blind
    told = [(line["log_level"], line["event"]) for line in logs if "seen" in line["event"]]
    assert told == [
        ("error", "the pools cannot be seen; nothing is decided"),
        ("info", "the pools are seen again"),
    ]


async def test_a_policy_its_cloud_cannot_have_is_refused_then_and_later(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY + "flip: {enabled: true}\n")

    def refuse(policy: Policy) -> str:
        return "flip.enabled: no" if policy.flip.enabled else ""

    with pytest.raises(ConfigError, match=r"policies\.yaml: flip\.enabled: no"):
        Scaling(path, Pools(), ManualClock(), refuse=refuse)
    path.write_text(POLICY)
    scaling = Scaling(path, Pools(), ManualClock(), refuse=refuse)
    path.write_text(POLICY + "flip: {enabled: true}\n")
    with capture_logs():
        await scaling.look()
    assert dict(scaling.figures().reloads) == {"refused": 1}


async def test_those_who_wait_for_a_sleeping_pool_are_told_to_wait_before_anything_is_decided(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY.replace("{max: 8", "{min: 0, max: 8") + "scale_to_zero: {patience: 7}\n")
    bench = Bench(path)
    await bench.registry.start()
    orders, _ = await report_demand(bench.registry.address, "g", demand())
    await bench.registry.stop()
    assert orders.patience == 7.0


async def test_while_engines_first_start_pools_are_looked_at_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY)
    looks: list[None] = []

    async def see() -> None:
        looks.append(None)
        raise Unavailable("the API server does not answer")

    clock = ManualClock()
    async with running(Scaling(path, Pools(), clock, see=see).prepare()):
        for seconds in (0, 5, 5):
            await clock.advance(seconds)
    assert len(looks) == 3
