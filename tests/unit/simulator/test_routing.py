"""The router in the simulator: repeated prefixes reach the engines that hold them, without crowding there."""

from collections.abc import Iterator
from random import Random
from typing import Any

from pdserve.core.endpoint import Role
from pdserve.router.rules import RoutingRules
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation
from pdserve.simulator.workload import from_trace
from pdserve_loadgen.traces import TraceEntry
from tests.unit.simulator.workloads import spec

BLOCK = 64
TURNS = 6
CONVERSATIONS = 60


def conversations() -> Iterator[TraceEntry]:
    """Each turn's prompt is the one before and three blocks more; turns of all conversations interleave."""
    rng = Random(7)
    turns = [(turn * 6.0 + rng.uniform(0, 6), turn, talk) for talk in range(CONVERSATIONS) for turn in range(TURNS)]
    for at, turn, talk in sorted(turns):
        blocks = 3 * (turn + 1)
        yield TraceEntry(
            at=at,
            input_tokens=blocks * BLOCK,
            output_tokens=4,
            hash_ids=tuple(talk * 1000 + block for block in range(blocks)),
            block_tokens=BLOCK,
        )


def run(policy: str, engines: dict[Role, int], **settings: Any) -> SimulationReport:
    return Simulation(spec(engines, policy=policy, block_size=BLOCK, **settings)).run(from_trace(conversations()))


def test_kv_aware_finds_at_least_twice_the_prefixes_of_round_robin_and_stays_even() -> None:
    engines = {Role.UNIFIED: 8}
    aware, blind = run("kv_aware", engines), run("round_robin", engines)
    assert aware.load.failed == blind.load.failed == 0
    assert aware.prefix_hit_share >= 2 * blind.prefix_hit_share > 0
    assert aware.imbalance <= 1.25
    assert aware.load.ttft
    assert blind.load.ttft
    assert aware.load.ttft.p50 < blind.load.ttft.p50


def test_prefill_pools_find_prefixes_too() -> None:
    engines = {Role.PREFILL: 4, Role.DECODE: 4}
    aware, blind = run("kv_aware", engines), run("round_robin", engines)
    assert aware.prefix_hit_share >= 2 * blind.prefix_hit_share > 0
    assert aware.load.failed == blind.load.failed == 0


def test_beginnings_are_fetched_between_simulated_engines_by_the_same_rules() -> None:
    engines = {Role.PREFILL: 4, Role.DECODE: 4}
    fetching = run("kv_aware", engines)
    computing = run("kv_aware", engines, rules=RoutingRules(fetch=False))
    fetched = [trace.fetch for r in fetching.requests if (trace := r.record.prompt_trace) and trace.fetch]
    assert fetched
    assert not [fetch.error for fetch in fetched if fetch.error]
    assert all(fetch.tokens >= BLOCK and fetch.seconds > 0 for fetch in fetched)
    assert not [r for r in computing.requests if r.record.prompt_trace and r.record.prompt_trace.fetch]
    assert [r.token_ids for r in fetching.requests] == [r.token_ids for r in computing.requests]
    assert fetching.load.failed == 0
    assert all(use.blocks.free == use.blocks.total for use in fetching.engines)
