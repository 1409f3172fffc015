"""What a gateway tells of its load: every request once, and no more memory than is told."""

from dataclasses import replace

import pytest

from pdserve.core.admission import Admission, Rejection
from pdserve.core.cluster import Mode, Route
from pdserve.core.endpoint import Role
from pdserve.core.request import Request, SamplingParams
from pdserve.dispatch.demand import DemandMeter, Held
from pdserve.dispatch.ledger import EngineLedger
from pdserve.router.kv_index import KVIndex
from pdserve.router.pool_model import PoolModel
from pdserve.rpc import convert
from pdserve.scaler.demand import MOST_SAMPLES, FirstToken, one_after_another
from pdserve.telemetry.record import RequestRecord
from tests.clocks import ManualClock
from tests.unit.router.views import cluster, view

STATE = cluster(view("p0", Role.PREFILL, backlog=1000), view("d0", Role.DECODE, used=500))
NOBODY = Held()


def request(tokens: int = 300) -> Request:
    return Request(id="r", prompt_token_ids=tuple(range(tokens)), sampling=SamplingParams(max_tokens=50))


def route(uncached: int) -> Route:
    prefill, decode = (each.endpoint for each in STATE.engines)
    return Route(mode=Mode.DISAGGREGATED, prefill=prefill, decode=decode, reason="", uncached_tokens=uncached)


async def test_a_request_is_told_with_what_it_took() -> None:
    clock = ManualClock()
    meter = DemandMeter(clock)
    with meter.request(request(), RequestRecord(request_id="r")) as metered:
        await clock.advance(0.5)
        metered.routed(route(200), EngineLedger(("p0", 1), KVIndex(), clock, PoolModel()))
        await clock.advance(1.0)
        metered.came(1)
        await clock.advance(0.2)
        metered.came(1)
        await clock.advance(0.9)
        metered.came(9)
    told = meter.report(STATE, NOBODY)
    [prompt], [first] = told.prompts, told.first_tokens
    assert (told.arrivals, told.ended, told.output_tokens, told.context_tokens) == (1, 1, 11, 305)
    assert (prompt.tokens, prompt.requests) == (256, 1)
    assert prompt.seconds == first.own > 0
    assert (round(first.seconds, 6), first.still) == (1.5, False)
    assert [round(gap, 6) for gap in told.handoff_gaps] == [0.2]
    assert [round(tpot, 6) for tpot in told.tpots] == [0.1]
    assert round(told.row_seconds, 6) == 2.1
    assert round(told.kv_token_seconds, 3) == round(305 * 2.1, 3)
    assert {facts.engine_id: facts.kv_used > 0 for facts in told.engines} == {"p0": False, "d0": True}
    again = meter.report(STATE, NOBODY)
    assert (again.arrivals, again.ended, again.first_tokens) == (0, 0, ())


async def test_who_waits_for_a_first_token_is_told_each_time_and_counts_once() -> None:
    clock = ManualClock()
    meter = DemandMeter(clock)
    with meter.request(request(), RequestRecord(request_id="r")) as metered:
        await clock.advance(2.0)
        early = meter.report(STATE, Held(requests=1, seconds=0.5, knocking=1))
        assert early.first_tokens == (FirstToken(seconds=2.0, own=0.0, still=True),)
        await clock.advance(1.0)
        metered.came(1)
    late = meter.report(STATE, NOBODY)
    both = one_after_another((early, late))
    assert both
    assert (both.arrivals, both.held, both.knocking, both.seconds) == (1, 0, 0, 3.0)
    assert both.first_tokens == (FirstToken(seconds=3.0, own=0.0),)


@pytest.mark.parametrize(("rejection", "seconds"), [(Rejection.TTFT, [4.0]), (Rejection.RATE, [])])
def test_who_was_turned_away_for_lack_of_engines_counts_as_far_too_late(
    rejection: Rejection, seconds: list[float]
) -> None:
    meter = DemandMeter(ManualClock())
    record = RequestRecord(request_id="r")
    with meter.request(request(), record):
        record.admission = Admission(
            tenant="default", priority=0, predicted_wait=1.0, predicted_ttft=1.7, ttft_target=2.0, rejection=rejection
        )
    assert [first.seconds for first in meter.report(STATE, NOBODY).first_tokens] == seconds


def test_samples_that_nobody_asks_for_do_not_pile_up() -> None:
    meter = DemandMeter(ManualClock())
    for _ in range(MOST_SAMPLES + 100):
        with meter.request(request(1), RequestRecord(request_id="r")) as metered:
            metered.came(1)
    told = meter.report(STATE, NOBODY)
    assert (told.arrivals, len(told.first_tokens)) == (MOST_SAMPLES + 100, MOST_SAMPLES)


def test_sequences_that_fetch_are_told_apart_all_the_way_from_the_engine() -> None:
    decode = view("d0", Role.DECODE)
    assert decode.load
    message = convert.load_to_proto(replace(decode.load, waiting=3, fetching=2))
    state = cluster(replace(decode, load=convert.load_from_proto(message)))
    (engine,) = DemandMeter(ManualClock()).report(state, NOBODY).engines
    assert (engine.waiting, engine.fetching) == (3, 2)
