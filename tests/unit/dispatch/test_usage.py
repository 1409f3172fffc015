"""What a request is found to have taken, and what that is in seconds of one engine."""

from dataclasses import replace

import pytest

from pdserve.core.admission import Usage
from pdserve.core.request import EngineTrace, PrefixFetch
from pdserve.dispatch.usage import Foreseen, engine_seconds, usage_of
from pdserve.telemetry.record import RequestRecord

FORESEEN = Foreseen(work=0.3, prompt_tokens=320, uncached_tokens=300, block_size=16, num_blocks=1000)


def trace(cached_tokens: int = 20, transfer_bytes: int = 0, fetched: int = 0) -> EngineTrace:
    fetch = PrefixFetch(engine_id="p1", tokens=16, num_bytes=fetched, seconds=0.1, backend="nixl")
    return EngineTrace(
        engine_id="e0",
        epoch=1,
        cached_tokens=cached_tokens,
        stamps=(),
        transfer_bytes=transfer_bytes,
        fetch=fetch if fetched else None,
    )


def record() -> RequestRecord:
    stamps = [("received", 90.0), ("routed", 100.0), ("first_token", 101.0)]
    return RequestRecord(request_id="r", stamps=stamps, prefill_trace=trace(), decode_trace=trace(transfer_bytes=5000))


def test_kv_is_held_from_the_route_to_the_end_and_the_answer_grows() -> None:
    usage = usage_of(record(), FORESEEN, output_tokens=64, ended=105.0)
    assert usage.kv_block_seconds == pytest.approx(20 * 5 + 4 / 2 * 4)
    assert usage.prefill_seconds == pytest.approx(0.3)
    assert usage.link_bytes == 5000


def test_what_was_cached_after_all_is_not_charged_and_fetched_bytes_are() -> None:
    found = replace(record(), prefill_trace=trace(cached_tokens=170, fetched=700))
    usage = usage_of(found, FORESEEN, output_tokens=64, ended=105.0)
    assert usage.prefill_seconds == pytest.approx(0.15)
    assert usage.link_bytes == 5700


def test_a_replay_that_found_more_cached_than_was_asked_for_first_costs_no_less_than_nothing() -> None:
    replayed = replace(record(), prefill_trace=trace(cached_tokens=500))
    assert usage_of(replayed, FORESEEN, output_tokens=300, ended=105.0).prefill_seconds == 0.0


def test_a_prompt_that_was_not_computed_to_its_end_counts_as_foreseen() -> None:
    lost = replace(record(), prefill_trace=None, decode_trace=None, stamps=[("routed", 100.0)])
    usage = usage_of(lost, replace(FORESEEN, uncached_tokens=0), output_tokens=0, ended=102.0)
    assert usage == Usage(prefill_seconds=0.3, kv_block_seconds=40.0)


def test_all_of_it_is_one_sum_in_seconds_of_an_engine() -> None:
    usage = Usage(prefill_seconds=0.3, kv_block_seconds=100.0, link_bytes=5 * 10**9)
    assert engine_seconds(usage, num_blocks=1000) == pytest.approx(0.3 + 0.1 + 1.0)
    assert engine_seconds(usage, num_blocks=0) == pytest.approx(1.3), "an engine that has not told its size"
