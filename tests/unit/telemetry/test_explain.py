"""What `pdserve explain` is told: enough to see why, JSON throughout."""

from dataclasses import replace
from typing import Any

import orjson
import pytest

from pdserve.cli.explain import render
from pdserve.core.admission import Admission, Rejection
from pdserve.telemetry.explain import explain
from pdserve.telemetry.record import RequestRecord
from tests.unit.telemetry.records import START, disaggregated, fetching, moved, replayed, stamps

FORESEEN: dict[str, Any] = {
    "tenant": "search",
    "priority": -1,
    "predicted_wait": 0.2,
    "predicted_ttft": 0.3,
    "ttft_target": 2.0,
}


def told(record: RequestRecord) -> dict[str, object]:
    answer: dict[str, object] = orjson.loads(orjson.dumps(explain(record)))
    return answer


def test_the_choice_is_shown_with_what_it_was_chosen_over() -> None:
    route = told(disaggregated())["route"]
    assert isinstance(route, dict)
    assert (route["mode"], route["prefill"], route["decode"]) == ("disaggregated", "prefill-0", "decode-0")
    assert route["reason"] == "cheapest"
    assert route["prediction"]["cost"] == 1.5
    assert [(other["prefill"], other["mode"], other["cost"]) for other in route["alternatives"]] == [
        ("prefill-1", "disaggregated", 2.0),
        (None, "decode_local", 4.0),
    ]


def test_the_timeline_counts_from_arrival_and_adds_up() -> None:
    answer = told(disaggregated("chatcmpl-1", "mine"))
    timeline = answer["timeline"]
    assert isinstance(timeline, list)
    assert timeline[0] == {
        "name": "read body",
        "part": "prompt",
        "where": "gateway",
        "offset": 0,
        "seconds": pytest.approx(0.004),
    }
    assert answer["total_seconds"] == pytest.approx(0.105)
    assert answer["unaccounted_seconds"] == pytest.approx(0.0, abs=1e-6)
    assert (answer["status"], answer["client_request_id"], answer["output_tokens"]) == ("ok", "mine", 12)


def test_what_was_lost_on_the_way_is_told() -> None:
    attempts = told(replayed())["failed_attempts"]
    assert isinstance(attempts, list)
    assert attempts[0]["code"] == "engine_died"
    assert attempts[0]["decode"] == "decode-0"
    assert attempts[0]["unix"] == START + 0.009


def test_a_request_that_runs_is_explained_as_far_as_it_got() -> None:
    answer = told(RequestRecord(request_id="r", stamps=stamps(("arrived", 0.0), ("read", 0.1))))
    assert (answer["status"], answer["total_seconds"], answer["route"]) == ("running", None, None)
    assert told(RequestRecord(request_id="r"))["timeline"] == []


def test_stages_overlap_and_each_has_its_own_seconds() -> None:
    assert disaggregated().durations() == pytest.approx(
        {"queue": 0.005, "prefill": 0.020, "transfer": 0.019, "decode": 0.054}
    )


def test_a_fetch_is_shown_as_it_was_planned_and_as_it_went() -> None:
    fetch = told(fetching())["fetch"]
    assert isinstance(fetch, dict)
    assert (fetch["source"], fetch["planned_tokens"], fetch["tokens"], fetch["error"]) == ("decode-1", 48, 48, "")
    assert told(disaggregated())["fetch"] is None


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (fetching(), "48 tokens, 2.0 KiB over shared_memory in 4.0 ms"),
        (fetching(0, "transfer_timeout"), "failed after 4.0 ms (transfer_timeout), so they were computed"),
        (replace(fetching(), prefill_trace=disaggregated().prefill_trace), "not done"),
    ],
    ids=["fetched", "failed", "not needed"],
)
def test_people_are_told_what_a_fetch_was_for_and_what_came_of_it(record: RequestRecord, shown: str) -> None:
    (line,) = [line for line in render(orjson.dumps(explain(record))).splitlines() if line.startswith("fetch: ")]
    assert "48 tokens of the prompt from decode-1, predicted 6.0 ms rather than 20.0 ms of computing" in line
    assert shown in line


def test_moves_are_told_with_their_pause_and_what_they_carried() -> None:
    text = render(orjson.dumps(explain(moved())))
    assert "could not move: decode-0 → decode-1 (transfer_failed); drain" in text
    assert (
        "moved: decode-0 → decode-1 in 20.0 ms, 4.0 ms of them a pause; 4.0 KiB over nixl; rebalance: decode-0 is full"
        in text
    )


@pytest.mark.parametrize(
    ("admission", "line"),
    [
        (Admission(waited=0.0, **FORESEEN), "admission: at once (tenant search, priority -1)"),
        (
            Admission(waited=0.25, ahead=3, **FORESEEN),
            "admission: waited 250.0 ms for its turn (tenant search, priority -1; predicted wait 200.0 ms behind 3, "
            "first token in 300.0 ms, target 2000.0 ms)",
        ),
        (Admission(**FORESEEN), "admission: waits for its turn (tenant search"),
        (Admission(rejection=Rejection.TTFT, **FORESEEN), "admission: refused: its first token would have come too"),
        (
            Admission(rejection=Rejection.DEADLINE, waited=1.0, **FORESEEN),
            "admission: refused after 1000.0 ms: its answer would have come later than the client waits",
        ),
    ],
)
def test_how_a_request_came_in_is_told_in_a_line(admission: Admission, line: str) -> None:
    record = replace(disaggregated(), admission=admission)
    assert line in render(orjson.dumps(explain(record)))


def test_every_reason_to_refuse_has_words() -> None:
    for rejection in Rejection:
        record = replace(disaggregated(), admission=Admission(rejection=rejection, **FORESEEN))
        assert "admission: refused" in render(orjson.dumps(explain(record)))


def test_waiting_for_its_turn_is_a_span_before_the_route() -> None:
    record = disaggregated()
    times = dict(record.stamps)
    admitted = (times["received"] + times["routed"]) / 2
    record.stamps.insert([name for name, _ in record.stamps].index("routed"), ("admitted", admitted))
    spans = {span["name"]: span for span in explain(record)["timeline"]}  # type: ignore[attr-defined]
    waited, route = spans["wait for its turn"], spans["route"]
    assert waited["seconds"] == pytest.approx(admitted - times["received"])
    assert route["offset"] == pytest.approx(waited["offset"] + waited["seconds"])
