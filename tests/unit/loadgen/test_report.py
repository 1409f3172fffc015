"""Measures, verdict and warnings against figures worked out by hand."""

import json
import re

import pytest

from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.render import render
from pdserve_loadgen.report import Outcome, Slo, build_report
from tests.loadgen_results import result


def test_measures_of_one_request_follow_their_formulas() -> None:
    one = result(0.5, 0.2, 0.1, 0.1, sent=3.0, late=0.25, output_tokens=5)
    assert one.ttft == pytest.approx(0.5)
    assert one.e2e == pytest.approx(0.9)
    assert one.tpot == pytest.approx((0.9 - 0.5) / (5 - 1))
    assert one.gaps == pytest.approx([0.2, 0.1, 0.1])
    assert one.handoff_gap == pytest.approx(0.2)
    assert one.lateness == pytest.approx(0.25)


def test_a_single_token_has_no_tpot_and_no_gaps() -> None:
    one = result(0.5)
    assert (one.tpot, one.gaps, one.handoff_gap) == (None, [], None)
    assert one.e2e == one.ttft == 0.5


def test_rates_count_from_the_first_sending_to_the_last_end() -> None:
    report = build_report([result(0.5, 0.5, sent=1.0), result(0.5, 1.5, sent=3.0, input_tokens=30)], title="")
    assert report.duration == pytest.approx(4.0)
    assert report.request_throughput == pytest.approx(2 / 4)
    assert report.output_throughput == pytest.approx(4 / 4)
    assert report.input_throughput == pytest.approx(40 / 4)


def test_warm_up_is_counted_and_nothing_else() -> None:
    cold = result(9.0, 9.0, warmup=True)
    report = build_report([cold, result(0.1, 0.2, sent=20.0)], title="")
    assert (report.requests, report.warmup) == (1, 1)
    assert report.ttft
    assert report.ttft.max == pytest.approx(0.1)
    assert report.duration == pytest.approx(0.3)


def test_latencies_are_those_of_complete_answers_and_errors_are_counted_by_code() -> None:
    broken = result(5.0, outcome=Outcome.ERROR, error="stream_broken")
    refused = result(outcome=Outcome.ERROR, error="http_503:unavailable")
    gone = result(7.0, outcome=Outcome.CANCELLED)
    report = build_report([result(0.1, 0.1), broken, refused, refused, gone], title="")
    assert (report.succeeded, report.failed, report.cancelled) == (1, 3, 1)
    assert report.errors == {"http_503:unavailable": 2, "stream_broken": 1}
    assert report.ttft
    assert report.ttft.max == pytest.approx(0.1)


def test_goodput_counts_what_met_every_bound() -> None:
    slo = Slo.parse("ttft=0.5, tpot=0.1, attainment=0.5")
    good, late, slow = result(0.4, 0.1), result(0.6, 0.05), result(0.4, 0.2)
    failed = result(outcome=Outcome.ERROR, error="timeout", finished=4.0)
    gone = result(0.1, outcome=Outcome.CANCELLED)
    verdict = build_report([good, good, late, slow, failed, gone], title="", slo=slo).verdict
    assert verdict
    assert (verdict.judged, verdict.met) == (5, 2)
    assert verdict.goodput == pytest.approx(2 / 4.0)
    assert verdict.attainment == pytest.approx(0.4)
    assert not verdict.passed
    assert build_report([good, late], title="", slo=slo).passed


@pytest.mark.parametrize(
    ("targets", "is_met"),
    [
        ("ttft=0.5", True),
        ("ttft=0.49", False),
        ("itl=0.3", True),
        ("itl=0.29", False),
        ("handoff_gap=0.1", True),
        ("handoff_gap=0.09", False),
        ("e2e=0.9", True),
        ("e2e=0.89", False),
        ("tpot=0.2", True),
        ("tpot=0.19", False),
    ],
)
def test_each_bound_is_upper_and_inclusive(targets: str, is_met: bool) -> None:
    assert Slo.parse(targets).is_met_by(result(0.5, 0.0999999, 0.2999999)) is is_met


def test_a_bound_on_what_a_request_lacks_is_met() -> None:
    assert Slo.parse("tpot=0.001,handoff_gap=0.001,itl=0.001").is_met_by(result(0.5))


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "speed=1", "ttft=1,ttft=2"]
)
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--slo"):
        Slo.parse(text)


def test_attainment_alone_or_above_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one bound"):
        Slo.parse("attainment=0.9")
    with pytest.raises(UsageError, match="at most 1"):
        Slo.parse("ttft=1,attainment=1.1")


def test_without_targets_a_run_passes_when_something_was_answered() -> None:
    assert build_report([result(0.1)], title="").passed
    assert not build_report([result(outcome=Outcome.ERROR, error="timeout")], title="").passed
    assert not build_report([], title="", slo=Slo.parse("ttft=1")).passed


def test_lateness_is_only_remarked_when_it_matters() -> None:
    def notes(late: float) -> str:
        return " ".join(build_report([result(0.2, 0.1, sent=1.0, late=late)], title="").notes)

    assert "itself was late" in notes(0.03)
    assert "itself was late" not in notes(0.01)


def test_grouped_tokens_are_remarked() -> None:
    grouped = build_report([result(0.2, 0.1, output_tokens=8)], title="")
    assert "4.00 tokens per event" in " ".join(grouped.notes)
    assert build_report([result(0.2, 0.1)], title="").notes == ()


def test_the_table_shows_milliseconds_errors_and_verdict() -> None:
    failed = result(outcome=Outcome.ERROR, error="http_503:unavailable")
    text = render(build_report([result(0.25, 0.125), failed], title="a [title]", slo=Slo.parse("ttft=0.5")))
    assert text.startswith("a [title]\n2 requests")
    assert re.search(r"^TTFT +250\.00 +250\.00", text, re.M)
    assert re.search(r"^handoff gap +125\.00", text, re.M)
    assert "error http_503:unavailable: 1" in text
    assert "FAIL: 1 of 2 requests (50.0%) met the targets, 90.0% wanted" in text


def test_an_empty_run_still_has_a_table() -> None:
    assert re.search(r"^TTFT +- ", render(build_report([], title="nothing")), re.M)


def test_the_dictionary_is_json_and_carries_the_verdict() -> None:
    report = build_report([result(0.2, 0.1)], title="t", slo=Slo.parse("ttft=0.5"), settings={"seed": 1})
    body = json.loads(json.dumps(report.to_dict()))
    assert body["schema"] == "pdserve-loadgen/1"
    assert body["verdict"]["passed"] is body["passed"] is True
    assert body["ttft"]["p50"] == pytest.approx(0.2)
    assert body["settings"] == {"seed": 1}


def test_notes_and_titles_are_not_cut_into_lines() -> None:
    note = "a note " * 40
    assert f"note: {note}".rstrip() in render(build_report([result(0.1)], title="long " * 40, notes=[note]))
