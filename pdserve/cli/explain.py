"""`pdserve explain`: where a request's time went and why it went that way, for people."""

import json
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from pdserve.core.errors import PdserveError

_BAR = 40
"""Characters of the widest bar."""
_WIDTH = 140


def render(answer: bytes) -> str:
    """The answer of GET /admin/requests/ID as text for a terminal. Raises PdserveError when it is not ours."""
    try:
        request: dict[str, Any] = json.loads(answer)
        sections = [
            _summary(request),
            *_admission(request),
            *_attempts(request),
            *_route(request),
            *_fetch(request),
            *_transfer(request),
            *_migrations(request),
            "",
            _timeline(request),
        ]
    except (ValueError, KeyError, TypeError):
        raise PdserveError("the answer is not a request's record; is this a pdserve gateway?") from None
    return "\n".join(sections)


def _summary(request: dict[str, Any]) -> str:
    total = request["total_seconds"]
    took = f"took {_ms(total)}" if total is not None else "has not ended"
    reason = f" ({request['finish_reason']})" if request["finish_reason"] else ""
    return (
        f"{request['request_id']}  {request['endpoint']}  {request['status']}{reason}, {took}\n"
        f"  {request['prompt_tokens']} prompt tokens, {request['cached_tokens']} of them cached; "
        f"{request['output_tokens']} output tokens"
    )


_REFUSED = {
    "ttft": "its first token would have come too late",
    "deadline": "its answer would have come later than the client waits",
    "queue_full": "too many waited already",
    "rate_limit": "the tenant's requests per second were used up",
    "concurrency_limit": "the tenant had as many requests in progress as it may",
}


def _admission(request: dict[str, Any]) -> list[str]:
    admission = request["admission"]
    if admission is None:
        return []
    who = f"tenant {admission['tenant']}, priority {admission['priority']}"
    waited, predicted = admission["waited"], admission["predicted_wait"]
    foreseen = (
        f"predicted wait {_ms(predicted)} behind {admission['ahead']}, first token in "
        f"{_ms(admission['predicted_ttft'])}, target {_ms(admission['ttft_target'])}"
    )
    if admission["rejection"]:
        after = f" after {_ms(waited)}" if waited else ""
        return [f"admission: refused{after}: {_REFUSED[admission['rejection']]} ({who}; {foreseen})"]
    if waited is None:
        return [f"admission: waits for its turn ({who}; {foreseen})"]
    if waited == 0:
        return [f"admission: at once ({who})"]
    return [f"admission: waited {_ms(waited)} for its turn ({who}; {foreseen})"]


def _attempts(request: dict[str, Any]) -> list[str]:
    return [
        f"attempt {number}: {_way(attempt)} was lost after {attempt['emitted_tokens']} tokens "
        f"({attempt['code']}: {attempt['message']})"
        for number, attempt in enumerate(request["failed_attempts"], start=1)
    ]


def _route(request: dict[str, Any]) -> list[str]:
    route = request["route"]
    if route is None:
        return ["route: none was found"]
    predicted = route["prediction"]
    lines = [f"route: {_way(route)}: {route['reason']}"]
    if predicted:
        lines.append(_prediction(predicted, request))
    for other in route["alternatives"]:
        against = f", {other['cost'] - predicted['cost']:+.4g} against the choice" if predicted else ""
        reason = f" ({other['reason']})" if other["reason"] else ""
        lines.append(f"  rather than {_way(other)}: cost {other['cost']:.4g}{against}{reason}")
    return lines


def _prediction(predicted: dict[str, float], request: dict[str, Any]) -> str:
    """What the router expected beside what came of it."""
    stamps, later = request["stamps"], request["output_tokens"] - 2
    first_token = _between(stamps, "received", "first_token")
    decoding = _between(stamps, "second_token", "finished")
    per_token = decoding / later if decoding is not None and later > 0 else None
    pairs = (
        ("first token", predicted["ttft"], first_token),
        ("handoff gap", predicted["handoff_gap"], request["handoff_gap"]),
        ("later tokens", predicted["tpot"], per_token),
    )
    return "  predicted " + ", ".join(
        f"{name} {_ms(expected)}" + (f" (was {_ms(actual)})" if actual is not None else "")
        for name, expected, actual in pairs
    )


def _between(stamps: dict[str, float], start: str, end: str) -> float | None:
    return stamps[end] - stamps[start] if start in stamps and end in stamps else None


def _fetch(request: dict[str, Any]) -> list[str]:
    fetch = request["fetch"]
    if fetch is None:
        return []
    planned = (
        f"fetch: {fetch['planned_tokens']} tokens of the prompt from {fetch['source']}, predicted "
        f"{_ms(fetch['predicted_seconds'])} rather than {_ms(fetch['saved_seconds'])} of computing"
    )
    if fetch["error"]:
        return [f"{planned}; failed after {_ms(fetch['seconds'])} ({fetch['error']}), so they were computed"]
    if fetch["seconds"] is None:
        return [f"{planned}; not done"]
    return [
        f"{planned}; {fetch['tokens']} tokens, {fetch['bytes'] / 1024:.1f} KiB over {fetch['backend']} "
        f"in {_ms(fetch['seconds'])}"
    ]


def _transfer(request: dict[str, Any]) -> list[str]:
    transfer = request["transfer"]
    if transfer is None:
        return []
    gap = request["handoff_gap"]
    return [
        f"transfer: {transfer['bytes'] / 1024:.1f} KiB over {transfer['backend']} in {transfer['pulls']} pulls"
        + (f", {transfer['mode']}" if transfer["mode"] else "")
        + (f"; handoff gap {_ms(gap)}" if gap is not None else ""),
        *([f"  predicted after the last chunk: {_forecast(transfer)}"] if transfer["forecast_seconds"] else []),
        *(f"  {lost['backend']} failed ({lost['code']}), another took over" for lost in transfer["failovers"]),
    ]


def _migrations(request: dict[str, Any]) -> list[str]:
    return [_migration(move) for move in request["migrations"]]


def _migration(move: dict[str, Any]) -> str:
    way = f"{move['from']} → {move['to']}"
    reason = f"{move['reason']}: {move['why']}" if move["why"] else move["reason"]
    if move["outcome"] is None:
        return f"moving: {way}; {reason}"
    if move["outcome"] != "ok":
        return f"could not move: {way} ({move['outcome']}); {reason}"
    over = f"; {move['bytes'] / 1024:.1f} KiB over {move['backend']}" if move["backend"] else ""
    return f"moved: {way} in {_ms(move['ended'] - move['asked'])}, {_ms(move['pause'])} of them a pause{over}; {reason}"


def _forecast(transfer: dict[str, Any]) -> str:
    return ", ".join(f"{mode} {_ms(seconds)}" for mode, seconds in transfer["forecast_seconds"].items())


def _timeline(request: dict[str, Any]) -> str:
    timeline = request["timeline"]
    whole = request["total_seconds"] or max((span["offset"] + span["seconds"] for span in timeline), default=0.0)
    table = Table(box=None, pad_edge=False)
    for title, right in (
        ("PART", False),
        ("SPAN", False),
        ("WHERE", False),
        ("AT MS", True),
        ("MS", True),
        ("", False),
    ):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    part = ""
    for span in timeline:
        shown = span["part"] if span["part"] != part else ""
        part = span["part"]
        bar = _bar(span["offset"], span["seconds"], whole)
        table.add_row(
            shown, span["name"], span["where"], f"{span['offset'] * 1e3:.2f}", f"{span['seconds'] * 1e3:.2f}", bar
        )
    if request["unaccounted_seconds"] is not None:
        table.add_row("", "in no span", "", "", f"{request['unaccounted_seconds'] * 1e3:.2f}", "")
    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _bar(offset: float, seconds: float, whole: float) -> str:
    """A span's place in the whole; a span too short for a block is a thin line."""
    if whole <= 0:
        return ""
    first = min(max(round(offset / whole * _BAR), 0), _BAR - 1)
    length = min(round(max(seconds, 0.0) / whole * _BAR), _BAR - first)
    return " " * first + ("█" * length or "▏")


def _way(route: dict[str, Any]) -> str:
    engines = dict.fromkeys(engine for engine in (route["prefill"], route["decode"]) if engine)
    return f"{route['mode']} on {' → '.join(engines)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
