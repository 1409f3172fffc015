"""A simulated deployment of known costs is the oracle: its reports must give those costs back."""

from typing import Any

import pytest

from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable
from pdserve.simulator.calibration import calibrated
from pdserve.simulator.profile import PRESETS, Links, StepCost
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve.telemetry.explain import explain
from tests.unit.simulator.workloads import PAIRS, trace

BASE = PRESETS["demo-cpu"]
LINKS = Links(latency=3e-3, bandwidth=BASE.links.bandwidth, verify=BASE.links.verify, per_pull=8e-3)
CAPACITY = {"num_blocks": 500, "block_size": 16}


def engine(role: Role, cost: StepCost, steps: int = 400) -> dict[str, Any]:
    """As GET /admin/steps describes one that took so many, and whose costs the router knows."""
    tally = {"steps": steps, "tokens": steps, "context": 9 * steps, "seconds": 1.0}
    model = {"base": cost.base, "per_token": cost.per_token, "per_context": cost.per_context}
    return {"role": role.value, "steps": [tally], "model": model, "capacity": CAPACITY}


COSTS = {
    Role.PREFILL: StepCost(base=6e-3, per_token=3e-4, per_context=2e-7),
    Role.DECODE: StepCost(base=9e-3, per_token=1e-3, per_context=4e-7),
}


def engines() -> list[dict[str, Any]]:
    return [engine(role, cost) for role, cost in COSTS.items() for _ in range(2)]


def requests() -> list[dict[str, Any]]:
    """As GET /admin/requests tells them, of a cluster with LINKS."""
    spec = SimulationSpec(profile=BASE.model_copy(update={"links": LINKS}), engines=PAIRS)
    report = Simulation(spec).run(from_trace(trace(60, rate=4.0), seed=1))
    told = []
    for request in report.requests:
        request.record.status = "ok"
        told.append(explain(request.record))
    return told


def test_each_pool_s_steps_and_memory_are_recovered() -> None:
    profile = calibrated(BASE, engines(), [])
    for role, cost in COSTS.items():
        assert profile.step_cost(role).model_dump() == pytest.approx(cost.model_dump())
    assert profile.kv_tokens == 8000
    assert "1600 steps" in profile.basis


def test_latency_and_the_cost_of_a_pull_are_recovered() -> None:
    profile = calibrated(BASE, engines(), requests())
    assert profile.links.latency == pytest.approx(LINKS.latency, rel=0.1)
    assert profile.links.per_pull == pytest.approx(LINKS.per_pull, rel=0.25)


def test_the_gateway_s_own_share_is_told_by_its_stamps() -> None:
    told = requests()
    for request in told:
        request["stamps"]["arrived"] = request["stamps"]["routed"] - 0.02
        request["stamps"]["first_sent"] = request["stamps"]["first_token"] + 0.01
    assert calibrated(BASE, engines(), told).gateway == pytest.approx(0.03)


def test_failed_and_running_requests_tell_nothing() -> None:
    told = requests()
    for request in told:
        request["stamps"]["routed"] -= 5.0
    told[0]["status"], told[1]["failed_attempts"] = "running", [{}]
    assert calibrated(BASE, engines(), told[:2]).links == BASE.links


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(Unavailable, match="put load"):
        calibrated(BASE, [engine(Role.PREFILL, COSTS[Role.PREFILL], steps=9)], [])
