"""Results of requests nobody sent, to hold the report to."""

from collections.abc import Sequence
from typing import Any

from pdserve_loadgen.result import Outcome, RequestResult


def result(
    *pauses: float, sent: float = 0.0, late: float = 0.0, outcome: Outcome = Outcome.OK, **fields: Any
) -> RequestResult:
    """A request whose pieces come after the pauses, the first counted from its sending."""
    times = _running(pauses, sent)
    given = {"output_tokens": len(pauses), "input_tokens": 10, "finished": times[-1] if times else sent} | fields
    return RequestResult(
        id="r",
        scheduled=sent - late,
        sent=sent,
        outcome=outcome,
        token_times=times,
        **given,
    )


def _running(pauses: Sequence[float], start: float) -> list[float]:
    times = []
    for pause in pauses:
        start += pause
        times.append(start)
    return times
