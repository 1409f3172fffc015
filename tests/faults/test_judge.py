"""The judge of fault runs finds what it is there to find."""

import json

from tests.faults.judge import ClientEvent, judge

WANTED = ["aa", "bb"]


def event(
    id: str, *, ask: int = 0, ends: tuple[str, ...] = ("stop",), answer: str = "aa", failed: int = 0
) -> ClientEvent:
    return ClientEvent(
        id=id, ask=ask, finish_reasons=ends, answer_hash=answer, error="", failed_attempts=failed, longest_pause=0.1
    )


def line(id: str) -> str:
    return "[gateway] " + json.dumps({"event": "request", "client_request_id": id})


def test_a_clean_run_is_clean() -> None:
    log = ["starting", line("a"), '{"event": "ready"}', "{broken", line("b")]
    verdict = judge([event("a", failed=1), event("b", ask=1, answer="bb")], log, WANTED)
    assert verdict.clean
    assert (verdict.requests, verdict.faulted) == (2, 1)


def test_a_request_without_an_end_on_either_side_is_lost() -> None:
    verdict = judge([event("a", ends=()), event("b")], [line("a")], WANTED)
    assert verdict.lost == ("a", "b")


def test_a_request_that_ends_twice_on_either_side_is_doubled() -> None:
    verdict = judge([event("a", ends=("stop", "stop")), event("b")], [line("a"), line("b"), line("b")], WANTED)
    assert verdict.doubled == ("a", "b")


def test_another_answer_than_the_undisturbed_one_is_wrong() -> None:
    verdict = judge([event("a", answer="bb"), event("b", ask=1, answer="bb")], [line("a"), line("b")], WANTED)
    assert verdict.wrong == ("a",)
