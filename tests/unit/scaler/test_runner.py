"""Carrying out: what reaches the cloud, what is kept, and what a dry run leaves alone."""

from collections.abc import Mapping

from pdserve.core.endpoint import Role
from pdserve.core.errors import PdserveError, Unavailable
from pdserve.scaler.decision import Replicas
from pdserve.scaler.explain import explain
from pdserve.scaler.orders import Orders
from pdserve.scaler.runner import Scaler
from tests.clocks import ManualClock
from tests.unit.scaler.policies import demand, policy, prompts


class ListedCloud:
    """Notes what it is asked for, or refuses."""

    def __init__(self, refusal: PdserveError | None = None) -> None:
        self.asked: list[tuple[str, Role, int]] = []
        self.refusal = refusal

    def pools(self) -> Mapping[Role, Replicas]:
        return {role: Replicas(wanted=2, ready=2) for role in (Role.PREFILL, Role.DECODE)}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        self.asked.append(("scale", role, engines))
        if self.refusal:
            raise self.refusal

    async def flip(self, engine_id: str, role: Role) -> None:
        raise AssertionError("no flip is enabled")


BUSY = demand(backlog=1.5, kv=0.6)


async def test_a_decision_is_carried_out_kept_and_counted() -> None:
    cloud = ListedCloud()
    scaler = Scaler(policy(), cloud, ManualClock())
    assert await scaler.step(BUSY) == Orders()
    assert cloud.asked == [("scale", Role.PREFILL, 3)]
    assert scaler.counts == {("scale", "backlog"): 1}
    told = explain(scaler)
    assert told["decisions"][0]["what"] == "prefill from 2 to 3 engines"
    assert [pool["role"] for pool in told["pools"]] == ["prefill", "decode"]


async def test_a_dry_run_changes_nothing_and_says_the_same_once() -> None:
    cloud = ListedCloud()
    scaler = Scaler(policy(dry_run=True, bypass={"enabled": True}), cloud, ManualClock())
    busy = demand(backlog=1.5, prompts=prompts(50, 0.1, tokens=256), arrivals=50)
    for _ in range(3):
        assert await scaler.step(busy) == Orders()
    assert cloud.asked == []
    assert all(decision.dry_run for decision in scaler.decisions)
    assert sorted(scaler.counts.values()) == [1] * len(scaler.counts)


async def test_a_cloud_that_refuses_is_asked_again_and_its_failures_are_counted() -> None:
    cloud = ListedCloud(Unavailable("no machine is free"))
    done: list[tuple[str, PdserveError | None]] = []
    scaler = Scaler(
        policy(), cloud, ManualClock(), done=lambda decision, failure: done.append((decision.rule, failure))
    )
    for _ in range(2):
        await scaler.step(BUSY)
    assert len(cloud.asked) == 2
    assert explain(scaler)["failures"] == {"unavailable": 2}
    assert explain(scaler)["latest_failure"] == "no machine is free"
    refusal, cloud.refusal = cloud.refusal, None
    await scaler.step(BUSY)
    assert (scaler.failures, scaler.latest_failure) == ({"unavailable": 2}, "")
    assert done == [("backlog", refusal), ("backlog", refusal), ("backlog", None)]


async def test_what_fails_again_and_again_is_kept_once_whatever_else_fails() -> None:
    cloud = ListedCloud(Unavailable("no machine is free"))
    scaler = Scaler(policy(), cloud, ManualClock())
    both = demand(backlog=1.5, kv=0.95)
    for _ in range(3):
        await scaler.step(both)
    assert len(cloud.asked) == 6
    assert len(scaler.decisions) == 2
    cloud.refusal = None
    for _ in range(2):
        await scaler.step(both)
    assert len(cloud.asked) == 10
    assert len(scaler.decisions) == 4, "the first success is that of the decision that was kept"


async def test_what_could_not_be_done_starts_no_cooldown() -> None:
    cloud, clock = ListedCloud(Unavailable("503")), ManualClock()
    scaler = Scaler(policy(prefill={"up": {"cooldown": 300.0}}), cloud, clock)
    await scaler.step(BUSY)
    await clock.advance(5.0)
    cloud.refusal = None
    for _ in range(3):
        await scaler.step(BUSY)
        await clock.advance(5.0)
    assert cloud.asked == 2 * [("scale", Role.PREFILL, 3)]


async def test_gateways_are_told_to_wait_only_where_pools_may_sleep() -> None:
    sleepy = policy(prefill={"min": 0}, decode={"min": 0}, scale_to_zero={"patience": 7.0})
    nights = {"schedules": [{"start": "22:00", "end": "06:00", "min": 0}]}
    by_night = policy(prefill=nights, decode=nights, scale_to_zero={"patience": 7.0})
    for given, patience in ((sleepy, 7.0), (by_night, 7.0), (policy(), 0.0)):
        assert (await Scaler(given, ListedCloud(), ManualClock()).step(BUSY)).patience == patience


async def test_so_many_decisions_are_kept() -> None:
    scaler = Scaler(policy(), ListedCloud(), ManualClock(), keep=3)
    for _ in range(5):
        await scaler.step(BUSY)
    assert len(scaler.decisions) == 3
    assert scaler.counts.total() == 5


async def test_the_policy_may_be_exchanged_between_two_steps() -> None:
    cloud = ListedCloud()
    scaler = Scaler(policy(dry_run=True), cloud, ManualClock())
    await scaler.step(BUSY)
    scaler.policy = policy()
    await scaler.step(BUSY)
    assert cloud.asked == [("scale", Role.PREFILL, 3)]
