"""Admission in a simulated cluster: the real gate, router, dispatch and engines far above what they can do."""

from collections.abc import Iterator
from random import Random

import pytest

from pdserve.core.admission import TenantRules
from pdserve.core.request import Request, SamplingParams
from pdserve.router.admission import AdmissionRules
from pdserve.simulator.report import SimulatedRequest
from pdserve.simulator.simulation import Simulation
from pdserve.simulator.workload import Arrival
from pdserve_loadgen.percentiles import percentile
from tests.unit.simulator.workloads import spec

TTFT, TPOT = 1.0, 0.1
RULES = AdmissionRules(ttft=TTFT, tpot=TPOT)
SECONDS = 12.0
WARM_UP = 1.0
"""Seconds until the router knows what steps take."""
CAPACITY = 34.0
"""Requests per second of this shape that two prefill engines of the profile compute: about."""


def arrivals(rate: float, tenant: str = "default", seed: int = 0) -> Iterator[Arrival]:
    rng, at, number = Random(f"{tenant} {seed}"), 0.0, 0
    while (at := at + rng.expovariate(rate)) < SECONDS:
        number += 1
        base = rng.randrange(2**30)
        prompt = tuple(range(base, base + round(350 * rng.lognormvariate(-0.08, 0.4))))
        sampling = SamplingParams(max_tokens=rng.randint(4, 16), seed=number)
        request = Request(id=f"{tenant}-{number}", prompt_token_ids=prompt, sampling=sampling, tenant=tenant)
        yield Arrival(at, request)


def serve(*loads: Iterator[Arrival]) -> tuple[SimulatedRequest, ...]:
    tenants = {"quiet": TenantRules(), "noisy": TenantRules()}
    workload = sorted((arrival for load in loads for arrival in load), key=lambda arrival: arrival.at)
    return Simulation(spec(admission=RULES, tenants=tenants, block_size=64)).run(workload).requests


def goodput(requests: tuple[SimulatedRequest, ...]) -> float:
    met = (r.result for r in requests if r.result.error is None)
    return sum((r.ttft or 0) <= TTFT and (r.tpot or 0) <= TPOT for r in met) / SECONDS


def test_a_cluster_with_moderate_load_refuses_nobody() -> None:
    requests = serve(arrivals(0.6 * CAPACITY))
    assert all(request.result.error is None for request in requests)
    assert goodput(requests) * SECONDS >= 0.99 * len(requests)


def test_goodput_at_three_times_the_peak_s_rate_is_nine_tenths_of_the_peak() -> None:
    peak = max(goodput(serve(arrivals(share * CAPACITY))) for share in (1.0, 1.2))
    beyond = serve(arrivals(3 * CAPACITY))
    assert goodput(beyond) >= 0.9 * peak
    refused = [r.result for r in beyond if r.result.error is not None]
    assert {result.error for result in refused} == {"overloaded"}
    assert max(result.finished - result.sent for result in refused) < 0.05
    late = [r for r in beyond if r.result.sent > WARM_UP and r.result.ttft and r.result.ttft > TTFT]
    assert len(late) <= 0.01 * len(beyond), "who is let in is in time"


@pytest.mark.parametrize("flood", [1.0, 4.0])
def test_one_tenant_s_flood_hardly_delays_another(flood: float) -> None:
    def ttft_p99(requests: tuple[SimulatedRequest, ...]) -> float:
        quiet = [r.result for r in requests if r.result.id.startswith("quiet") and r.result.sent > WARM_UP]
        assert all(result.error is None for result in quiet)
        return percentile(sorted(result.ttft or 0.0 for result in quiet), 99)

    alone = ttft_p99(serve(arrivals(0.2 * CAPACITY, "quiet")))
    beside = ttft_p99(serve(arrivals(0.2 * CAPACITY, "quiet"), arrivals(flood * CAPACITY, "noisy")))
    assert beside <= 1.5 * alone
