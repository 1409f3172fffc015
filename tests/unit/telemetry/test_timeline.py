"""Spans of a record: every stage once, in the right place, adding up to the whole."""

from itertools import pairwise

import pytest

from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.timeline import Part, covered, spans, total
from tests.unit.telemetry.records import START, disaggregated, moved, replayed, route, stamps, trace


def named(record: RequestRecord) -> dict[str, tuple[str, float]]:
    """Place and milliseconds by name."""
    return {span.name: (span.where, round(span.seconds * 1e3, 6)) for span in spans(record)}


def test_spans_of_the_prompt_follow_one_another_without_a_gap_to_the_first_token() -> None:
    prompt = [span for span in spans(disaggregated()) if span.part is Part.PROMPT]
    assert prompt[0].start == START
    assert all(earlier.end == later.start for earlier, later in pairwise(prompt))
    assert prompt[-1].end == pytest.approx(START + 0.047)


def test_every_stage_of_a_handoff_has_its_place_and_time() -> None:
    found = named(disaggregated())
    assert found["submit"] == ("gateway → prefill-0", 5)
    assert found["queue"] == ("prefill-0", 5)
    assert found["prefill"] == ("prefill-0", 19)
    assert found["first token"] == ("prefill-0 → gateway", 1)
    assert found["pass ticket on"] == ("gateway → decode-0", 1)
    assert found["pull"] == ("decode-0", 8)
    assert found["second token"] == ("decode-0 → gateway", 10)
    assert found["decode"] == ("gateway", 45)


def test_a_whole_record_leaves_no_time_unexplained() -> None:
    record = disaggregated()
    assert total(record) == pytest.approx(0.105)
    assert covered(spans(record)) == pytest.approx(0.105)


def test_time_that_no_span_covers_is_not_counted() -> None:
    record = disaggregated()
    record.stamps = [(name, unix) for name, unix in record.stamps if name not in ("read", "routed")]
    assert covered(spans(record)) == pytest.approx(0.105 - 0.010 - 0.008)


def test_an_engine_that_does_everything_has_no_handoff() -> None:
    record = disaggregated()
    record.route, record.prefill_trace = route("decode-0", "decode-0"), None
    record.decode_trace = trace("decode-0", ("queued", 0.02), ("scheduled", 0.025), ("first_token", 0.04))
    record.stamps = stamps(("received", 0.0), ("routed", 0.01), ("first_token", 0.05), ("finished", 0.1))
    assert named(record) == {
        "route": ("gateway", 10),
        "submit": ("gateway → decode-0", 10),
        "queue": ("decode-0", 5),
        "first token": ("decode-0 → gateway", 10),
        "decode": ("gateway", 50),
    }


def test_a_lost_attempt_is_a_span_and_nothing_runs_backwards() -> None:
    found = named(replayed())
    assert found["route"] == ("gateway", 1)
    assert found["lost: engine_died"] == ("prefill-0 → decode-0", 7)
    assert found["route again"] == ("gateway", 3)
    assert all(milliseconds >= 0 for _, milliseconds in found.values())
    assert "first token" not in found, "the token had gone out before the second engine computed the prompt"


def test_a_request_that_still_runs_has_the_spans_it_has_ended() -> None:
    record = RequestRecord(request_id="r", stamps=stamps(("arrived", 0.0), ("read", 0.1)))
    assert named(record) == {"read body": ("gateway", 100)}
    assert total(record) is None
    assert spans(RequestRecord(request_id="new")) == []


def test_every_move_is_a_span_of_the_answer_between_its_two_engines() -> None:
    found = [span for span in spans(moved()) if span.name.startswith("migrate")]
    assert [(span.name, span.part, span.where) for span in found] == [
        ("migrate: transfer_failed", Part.ANSWER, "decode-0 → decode-1"),
        ("migrate", Part.ANSWER, "decode-0 → decode-1"),
    ]
    assert [round(span.seconds, 3) for span in found] == [0.004, 0.02]
