"""Two racks with a slow network between them: handoffs stay within a rack, mostly or always."""

from collections import Counter
from typing import Literal

from pdserve.config.pools import DecodePool, PoolsConfig, PrefillPool
from pdserve.core.cluster import Mode
from pdserve.core.endpoint import Role
from pdserve.router.rules import RoutingRules
from pdserve.simulator.profile import PRESETS, Links
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation, SimulationSpec
from tests.unit.simulator.workloads import workload

RACKS = ("rack-0", "rack-1")
ENGINES = {Role.PREFILL: 4, Role.DECODE: 4}
KV_BYTES_PER_SECOND = 2e7
"""Between racks; ten times as many within."""


def run(topology: Literal["preferred", "required"], *, labelled: bool = True) -> SimulationReport:
    """The links are as they are whether or not the router is told of the racks."""
    racks = RACKS if labelled else None
    profile = PRESETS["demo-cpu"].model_copy(
        update={
            "links": Links(latency=5e-4, bandwidth=10 * KV_BYTES_PER_SECOND, far_bandwidth=KV_BYTES_PER_SECOND),
            "pools": PoolsConfig(prefill=PrefillPool(domain=racks), decode=DecodePool(domain=racks)),
        }
    )
    rules = RoutingRules(topology=topology)
    report = Simulation(SimulationSpec(profile=profile, engines=ENGINES, rules=rules)).run(workload(120, rate=12.0))
    assert report.load.failed == 0
    return report


def handoffs(report: SimulationReport) -> Counter[bool]:
    """By whether both engines have the same place among the racks."""
    routes = [request.record.route for request in report.requests]
    pairs = [(r.prefill.engine_id, r.decode.engine_id) for r in routes if r and r.mode is Mode.DISAGGREGATED]
    return Counter(int(p.rpartition("-")[2]) % 2 == int(d.rpartition("-")[2]) % 2 for p, d in pairs)


def test_required_hands_nothing_over_between_racks() -> None:
    near = handoffs(run("required"))
    assert near[True] > 50
    assert near[False] == 0


def test_preferred_hands_most_over_within_a_rack_and_unlabelled_engines_about_half() -> None:
    told, blind = handoffs(run("preferred")), handoffs(run("preferred", labelled=False))
    assert told[True] > 4 * told[False]
    assert blind[True] < 2 * blind[False]
