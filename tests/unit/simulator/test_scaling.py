"""Engines that come and go in the simulator: they take their time, cost what they are there for, and lose nothing."""

from collections.abc import Mapping

from pdserve.core.endpoint import Role
from pdserve.scaler.controller import Now, Outcome
from pdserve.scaler.decision import Action, Decision, FlipRole, Replicas, Scale
from pdserve.scaler.demand import Demand
from pdserve.scaler.memory import Memory
from pdserve.scaler.policy import Policy
from pdserve.simulator.profile import PRESETS
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.scaling import ScalingSpec
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.traces import TraceEntry
from tests.unit.scaler.policies import policy

OUTPUT = 250
"""Tokens of every answer, so that some are being written whenever engines change."""


class Script:
    """Decides what is written down, at the looks that are written down."""

    def __init__(self, actions: Mapping[int, Action]) -> None:
        self.actions = actions
        self.looks = 0
        self.demands: list[Demand] = []
        self.clouds: list[Mapping[Role, Replicas]] = []

    def __call__(
        self, policy: Policy, memory: Memory, demand: Demand, cloud: Mapping[Role, Replicas], now: Now
    ) -> Outcome:
        self.looks += 1
        self.demands.append(demand)
        self.clouds.append(cloud)
        action = self.actions.get(self.looks)
        decisions = (Decision(at=now.unix, action=action, rule="script", reason=""),) if action else ()
        return Outcome(memory=memory, decisions=decisions, assessments=(), held={})


def serve(script: Script, *, prefill: int = 1, decode: int = 2, count: int = 30, rate: float = 3.0) -> SimulationReport:
    entries = [TraceEntry(at=n / rate, input_tokens=300, output_tokens=OUTPUT, hash_ids=(n,)) for n in range(count)]
    spec = SimulationSpec(
        profile=PRESETS["demo-cpu"],
        engines={Role.PREFILL: prefill, Role.DECODE: decode},
        scaling=ScalingSpec(policy=policy(interval=1.0, window=5.0), warm_up=2.0, decide=script),
    )
    return Simulation(spec).run(from_trace(entries, seed=1))


def answers(report: SimulationReport) -> dict[str, tuple[int, ...]]:
    return {each.result.id: each.token_ids for each in report.requests}


UNDISTURBED = answers(serve(Script({})))


def test_an_engine_is_ready_after_its_warm_up_and_costs_from_its_start() -> None:
    script = Script({2: Scale(role=Role.PREFILL, engines=3, before=1)})
    report = serve(script)
    ready = [pools[Role.PREFILL].ready for pools in script.clouds[:6]]
    wanted = [pools[Role.PREFILL].wanted for pools in script.clouds[:6]]
    assert ready[:3] == [1, 1, 1]
    assert max(ready) == 3
    assert wanted[1:3] == [1, 3]
    last_arrival = 29 / 3.0
    assert abs(report.scaling.engine_seconds[Role.PREFILL] - (3 * last_arrival - 2 * 2.0)) < 0.1
    assert abs(report.scaling.engine_seconds[Role.DECODE] - 2 * last_arrival) < 0.1
    assert answers(report) == UNDISTURBED


def test_an_engine_that_leaves_drains_and_no_token_changes() -> None:
    report = serve(Script({2: Scale(role=Role.DECODE, engines=1, before=2, victims=("decode-0",))}))
    assert answers(report) == UNDISTURBED
    assert [use.engine_id for use in report.engines if not use.alive] == ["decode-0"]
    assert sum(len(each.record.migrations) for each in report.requests) > 0
    assert report.replays == 0


def test_an_engine_takes_the_other_role_and_no_token_changes() -> None:
    script = Script({3: FlipRole(engine_id="decode-0", role=Role.PREFILL)})
    report = serve(script)
    assert answers(report) == UNDISTURBED
    assert report.replays == 0
    assert [script.clouds[n][Role.PREFILL].ready for n in (1, 4)] == [1, 2]
    late = [each.record.route for each in report.requests[15:]]
    assert {route.prefill.engine_id for route in late if route} == {"prefill-0", "decode-0"}
    assert {route.decode.engine_id for route in late if route} == {"decode-1"}


def test_a_role_that_is_taken_back_serves_as_before() -> None:
    there_and_back: dict[int, Action] = {
        2: FlipRole(engine_id="decode-0", role=Role.PREFILL),
        5: FlipRole(engine_id="decode-0", role=Role.DECODE),
    }
    report = serve(Script(there_and_back))
    assert answers(report) == UNDISTURBED
    late = [each.record.route for each in report.requests[-6:]]
    assert {route.prefill.engine_id for route in late if route} == {"prefill-0"}


def test_what_is_asked_for_and_no_longer_wanted_never_starts() -> None:
    changes: dict[int, Action] = {
        2: Scale(role=Role.PREFILL, engines=4, before=1),
        3: Scale(role=Role.PREFILL, engines=1, before=4),
    }
    report = serve(Script(changes))
    assert {use.engine_id for use in report.engines} == {"prefill-0", "decode-0", "decode-1"}
    assert abs(report.scaling.engine_seconds[Role.PREFILL] - (29 / 3.0 + 3 * 1.0)) < 0.1


def test_demand_counts_every_request_once() -> None:
    script = Script({})
    report = serve(script)
    assert sum(demand.arrivals for demand in script.demands) == 30
    assert sum(each.requests for demand in script.demands for each in demand.prompts) == 30
    told = sum(demand.ended for demand in script.demands)
    assert 20 <= told <= 30
    assert sum(demand.output_tokens for demand in script.demands) == OUTPUT * told
    firsts = [each.seconds for demand in script.demands for each in demand.first_tokens if not each.still]
    ttfts = [each.result.ttft for each in report.requests if each.result.ttft]
    assert max(firsts) <= max(ttfts)


def test_the_same_seed_gives_the_same_timeline() -> None:
    reports = [serve(Script({2: Scale(role=Role.DECODE, engines=3, before=2)})) for _ in range(2)]
    assert reports[0].scaling.timeline == reports[1].scaling.timeline
