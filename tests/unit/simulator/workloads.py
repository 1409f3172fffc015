"""Small deployments and workloads for simulations."""

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

from pdserve.core.endpoint import Role
from pdserve.simulator.profile import PRESETS
from pdserve.simulator.simulation import SimulationSpec
from pdserve.simulator.workload import Arrival, from_trace
from pdserve_loadgen.traces import TraceEntry

PAIRS = {Role.PREFILL: 2, Role.DECODE: 2}
UNIFIED = {Role.UNIFIED: 2}


def spec(engines: dict[Role, int] | None = None, **settings: Any) -> SimulationSpec:
    return SimulationSpec(profile=PRESETS["demo-cpu"], engines=engines or PAIRS, **settings)


def trace(count: int, *, seed: int = 0, rate: float = 20.0, groups: int = 4) -> Iterable[TraceEntry]:
    """Poisson arrivals; prompts of 40 to 400 tokens, each beginning with one of `groups` shared blocks of 64."""
    rng = Random(seed)
    at = 0.0
    for number in range(count):
        at += rng.expovariate(rate)
        yield TraceEntry(
            at=at,
            input_tokens=rng.randint(40, 400),
            output_tokens=rng.randint(1, 30),
            hash_ids=(rng.randrange(groups), groups + number),
            block_tokens=64,
        )


def workload(count: int, *, seed: int = 0, rate: float = 20.0, groups: int = 4) -> Iterator[Arrival]:
    return from_trace(trace(count, seed=seed, rate=rate, groups=groups), seed=seed)
