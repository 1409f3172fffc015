"""Moves that even out load, in virtual time."""

from collections.abc import Iterable
from random import Random

from pdserve.core.endpoint import Role
from pdserve.router.rules import RoutingRules
from pdserve.simulator.cluster import Fault
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation
from pdserve.simulator.workload import from_trace
from pdserve.telemetry.record import MoveReason
from pdserve_loadgen.traces import TraceEntry
from tests.unit.simulator.test_simulation import answers, assert_conserved
from tests.unit.simulator.workloads import spec

COUNT = 20
RETURNS = Fault(at=0.05, engine_id="decode-1", lasts=1.5)
"""It is back when the other one has every request."""


def trace() -> Iterable[TraceEntry]:
    rng = Random(5)
    for number in range(COUNT):
        yield TraceEntry(
            at=0.1 + number / 15,
            input_tokens=rng.randint(40, 400),
            output_tokens=rng.randint(400, 800),
            hash_ids=(number,),
            block_tokens=4096,
        )


def run(*, rebalance: bool) -> SimulationReport:
    deployment = spec({Role.PREFILL: 1, Role.DECODE: 2}, rules=RoutingRules(rebalance=rebalance))
    return Simulation(deployment).run(from_trace(trace(), seed=1), faults=[RETURNS])


def test_an_engine_that_comes_back_takes_over_some_of_what_runs() -> None:
    left, evened = run(rebalance=False), run(rebalance=True)
    assert_conserved(evened, COUNT)
    assert answers(evened) == answers(left)
    moves = [move for request in evened.requests for move in request.record.migrations]
    assert moves
    assert {(move.source, move.target, move.reason, move.outcome) for move in moves} == {
        ("decode-0", "decode-1", MoveReason.REBALANCE, "ok")
    }
    assert evened.load.e2e
    assert left.load.e2e
    assert evened.load.e2e.mean < left.load.e2e.mean
