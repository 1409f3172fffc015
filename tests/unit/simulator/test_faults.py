"""Engines that die or freeze in virtual time: no request is lost, doubled or wrong, and no block is kept."""

import pytest

from pdserve.core.batch import Batch
from pdserve.core.endpoint import Role
from pdserve.core.errors import EngineDied
from pdserve.simulator.cluster import Fault, FaultKind
from pdserve.simulator.executor import SimExecutor, SimStep
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation
from tests.unit.simulator.test_simulation import answers, assert_conserved
from tests.unit.simulator.workloads import UNIFIED, spec, workload

COUNT = 60
TIMES = spec().times


def undisturbed() -> dict[str, tuple[int, ...]]:
    return answers(Simulation(spec()).run(workload(COUNT)))


def run(*faults: Fault) -> SimulationReport:
    return Simulation(spec()).run(workload(COUNT), faults=faults)


@pytest.mark.parametrize("engine_id", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("at", [0.78, 1.01])
def test_a_killed_engine_costs_no_request_and_no_token(engine_id: str, at: float) -> None:
    report = run(Fault(at=at, engine_id=engine_id, lasts=1.0))
    assert_conserved(report, COUNT)
    assert report.load.failed == 0
    assert answers(report) == undisturbed()
    assert report.replays > 0
    incarnations = [use.alive for use in report.engines if use.engine_id == engine_id]
    assert sorted(incarnations) == [False, True]


@pytest.mark.parametrize("engine_id", ["prefill-1", "decode-1"])
def test_a_frozen_engine_is_fenced_and_its_requests_go_on_elsewhere(engine_id: str) -> None:
    report = run(Fault(at=0.5, engine_id=engine_id, kind=FaultKind.FREEZE))
    assert_conserved(report, COUNT)
    assert answers(report) == undisturbed()
    assert report.replays > 0
    assert report.load.itl
    assert report.load.ttft
    longest_pause = max(report.load.itl.max, report.load.ttft.max)
    # A first token comes from the prefill engine, perhaps after the decode engine was last heard from.
    assert TIMES.suspect - TIMES.heartbeat < longest_pause < TIMES.suspect + 2 * TIMES.heartbeat


@pytest.mark.parametrize("engine_id", ["prefill-0", "decode-0"])
def test_a_short_freeze_is_only_a_pause(engine_id: str) -> None:
    report = run(Fault(at=0.5, engine_id=engine_id, kind=FaultKind.FREEZE, lasts=1.0))
    assert_conserved(report, COUNT)
    assert answers(report) == undisturbed()
    assert report.replays == 0
    assert all(use.alive for use in report.engines)


def test_without_any_engine_left_every_request_fails_by_name() -> None:
    faults = [Fault(at=0.5, engine_id=f"unified-{number}") for number in range(UNIFIED[Role.UNIFIED])]
    report = Simulation(spec(UNIFIED)).run(workload(COUNT), faults=faults)
    assert_conserved(report, COUNT)
    assert 0 < report.load.failed < COUNT
    assert set(report.load.errors) <= {"unavailable", "engine_died"}


def test_a_fault_on_an_engine_that_does_not_exist_changes_nothing() -> None:
    assert answers(run(Fault(at=0.1, engine_id="nobody"))) == undisturbed()


def test_random_kills_and_freezes_lose_nothing() -> None:
    faults = [
        Fault(at=0.2, engine_id="decode-0", lasts=0.5),
        Fault(at=0.9, engine_id="prefill-1", kind=FaultKind.FREEZE, lasts=0.7),
        Fault(at=1.4, engine_id="prefill-0", lasts=0.2),
        Fault(at=2.2, engine_id="decode-1", kind=FaultKind.FREEZE, lasts=2.0),
    ]
    report = run(*faults)
    assert_conserved(report, COUNT)
    expected = undisturbed()
    complete = {request.result.id for request in report.requests if request.result.error is None}
    assert {name: tokens for name, tokens in answers(report).items() if name in complete} == {
        name: expected[name] for name in complete
    }
    assert len(complete) >= COUNT - 3  # a request on two engines as they died is refused as poison


def test_equal_faults_give_equal_reports() -> None:
    fault = Fault(at=0.5, engine_id="decode-0", kind=FaultKind.FREEZE)
    assert run(fault).to_dict() == run(fault).to_dict()


def test_an_engine_that_ends_by_itself_is_an_error_even_if_replay_would_hide_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: SimExecutor, batch: Batch) -> SimStep:
        raise EngineDied("the worker is gone")

    monkeypatch.setattr(SimExecutor, "forward", broken)
    with pytest.raises(RuntimeError, match="the worker is gone"):
        Simulation(spec()).run(workload(1))
