"""Whole simulations: deterministic, conserving, and saying the same whatever the deployment."""

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import orjson
import pytest

from pdserve.core.cluster import Mode
from pdserve.core.endpoint import Role
from pdserve.router.policies import LeastLoaded
from pdserve.simulator.profile import PoolSteps, StepCost
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation
from pdserve_loadgen.report import Outcome, Slo
from tests.unit.simulator.workloads import UNIFIED, spec, workload


def answers(report: SimulationReport) -> dict[str, tuple[int, ...]]:
    return {request.result.id: request.token_ids for request in report.requests}


def assert_conserved(report: SimulationReport, count: int) -> None:
    """Every request ended once with all its tokens, and no engine still holds a block of any."""
    assert len(report.requests) == len({request.result.id for request in report.requests}) == count
    assert report.load.succeeded + report.load.failed == count
    for use in report.engines:
        assert not use.alive or use.blocks.free == use.blocks.total


def test_equal_seeds_give_equal_reports_in_any_process() -> None:
    script = (
        "import sys, orjson\n"
        "from pdserve.simulator.simulation import Simulation\n"
        "from tests.unit.simulator.workloads import spec, workload\n"
        "report = Simulation(spec(seed=3)).run(workload(30, seed=5))\n"
        "sys.stdout.buffer.write(orjson.dumps([report.to_dict(), [r.record.to_dict() for r in report.requests]]))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=60
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert b'"succeeded":30' in outputs.pop()


def test_other_seeds_give_other_tokens() -> None:
    one, other = (Simulation(spec()).run(workload(5, seed=seed)) for seed in (1, 2))
    assert set(answers(one).values()).isdisjoint(answers(other).values())


def test_an_hour_passes_in_seconds() -> None:
    begun = time.perf_counter()
    report = Simulation(spec({Role.UNIFIED: 1})).run(workload(20, rate=0.005))
    assert report.load.duration > 3600
    assert time.perf_counter() - begun < 360


def test_every_request_ends_once_with_as_many_tokens_as_the_trace_says() -> None:
    arrivals = list(workload(150, rate=60.0))
    report = Simulation(spec()).run(arrivals)
    assert_conserved(report, 150)
    assert report.load.failed == 0
    expected = {arrival.request.id: arrival.request.sampling.max_tokens for arrival in arrivals}
    assert {name: len(tokens) for name, tokens in answers(report).items()} == expected
    assert any(request.record.route and request.record.route.mode is Mode.DISAGGREGATED for request in report.requests)


@pytest.mark.parametrize(
    "settings",
    [{"engines": UNIFIED}, {"depth": 1}, {"block_size": 64}, {"policy": "round_robin"}],
    ids=["unified", "one step in flight", "large blocks", "another policy"],
)
def test_answers_do_not_depend_on_the_deployment(settings: dict[str, Any]) -> None:
    plain = Simulation(spec()).run(workload(60, rate=60.0))
    varied = Simulation(spec(**settings)).run(workload(60, rate=60.0))
    assert plain.load.failed == varied.load.failed == 0
    assert answers(plain) == answers(varied)


def test_preempted_sequences_say_the_same() -> None:
    crowded = Simulation(spec(UNIFIED, kv_tokens=512)).run(workload(60, rate=200.0))
    traces = [request.record.decode_trace for request in crowded.requests]
    assert any(name == "preempted" for trace in traces if trace for name, _ in trace.stamps)
    assert answers(crowded) == answers(Simulation(spec(UNIFIED)).run(workload(60, rate=200.0)))


def test_two_steps_in_flight_are_not_slower_than_one() -> None:
    two, one = (Simulation(spec(depth=depth)).run(workload(60)) for depth in (2, 1))
    assert two.load.tpot
    assert one.load.tpot
    assert two.load.tpot.mean <= one.load.tpot.mean


def test_shared_prefixes_are_hit_as_the_trace_shares_them() -> None:
    report = Simulation(spec({Role.UNIFIED: 1}, block_size=64)).run(workload(80, rate=2.0))
    first_blocks = sum(request.result.input_tokens > 64 for request in report.requests)
    prompt_tokens = sum(request.result.input_tokens for request in report.requests)
    # All but the first prompt of each of the four groups find their group's block, and nothing else is shared.
    assert report.prefix_hit_share == pytest.approx((first_blocks - 4) * 64 / prompt_tokens)


def test_a_report_tells_latencies_of_the_profile_and_judges_targets() -> None:
    report = Simulation(spec({Role.UNIFIED: 1})).run(workload(1), slo=Slo(ttft=1e-6))
    step = spec().profile.step
    assert report.load.tpot
    assert report.load.tpot.p50 >= step.base
    assert not report.load.passed
    body = orjson.loads(orjson.dumps(report.to_dict()))
    assert body["simulation"]["engines"][0]["engine_id"] == "unified-0"
    assert "unified-0" in report.render()


def test_sixty_four_engines_serve_a_thousand_requests_each_ending_once() -> None:
    deployment = spec({Role.PREFILL: 32, Role.DECODE: 32})
    report = Simulation(deployment).run(workload(1000, rate=400.0, groups=40))
    assert_conserved(report, 1000)
    assert report.load.failed == 0
    assert all(request.result.outcome is Outcome.OK for request in report.requests)
    assert all(use.tokens > 0 for use in report.engines)
    assert report.imbalance < 1.25
    in_turn = Simulation(replace(deployment, policy="round_robin")).run(workload(1000, rate=400.0, groups=40))
    assert report.prefix_hit_share > 1.5 * in_turn.prefix_hit_share
    assert report.load.ttft
    assert in_turn.load.ttft
    assert report.load.ttft.p50 < in_turn.load.ttft.p50
    assert report.load.ttft.p99 < 1.25 * in_turn.load.ttft.p99


def test_pools_have_step_costs_of_their_own_and_a_gateway_costs_time() -> None:
    def median_ttft(**changes: Any) -> float:
        base = spec()
        profile = base.profile.model_copy(update=changes)
        report = Simulation(replace(base, profile=profile)).run(workload(30, rate=2.0))
        assert report.load.ttft
        return report.load.ttft.p50

    plain = median_ttft()
    slow = StepCost(base=0.5, per_token=0.0, per_context=0.0)
    assert median_ttft(gateway=0.25) == pytest.approx(plain + 0.25, abs=0.02)
    assert median_ttft(pool_steps=PoolSteps(prefill=slow)) > 0.5
    assert median_ttft(pool_steps=PoolSteps(decode=slow)) < 0.5


def test_a_policy_may_be_given_as_what_builds_it() -> None:
    named, built = (Simulation(spec(policy=policy)).run(workload(20)) for policy in ("least_loaded", LeastLoaded))
    assert answers(named) == answers(built)
    assert [r.record.route for r in named.requests] == [r.record.route for r in built.requests]
