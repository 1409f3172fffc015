"""Where a request's time went: its record's stamps as named, located spans.

Spans of the prompt follow one another from arrival to first token. Those of the handoff lie beside them, for KV
moves while later chunks are computed. Stamps come from the clocks of several processes: between machines whose
clocks differ, a span across both shows the difference, and may even be negative.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pdserve.telemetry.record import RequestRecord

LOST = "lost: "
"""Names of spans of attempts that failed begin with this; the error's code follows."""


class Part(StrEnum):
    """What a span belongs to."""

    PROMPT = "prompt"
    HANDOFF = "handoff"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """start and end are Unix seconds. where is "gateway", an engine's id, or "from → to"."""

    name: str
    part: Part
    where: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class _Actor(StrEnum):
    GATEWAY = "gateway"
    PROMPT = "prompt"
    DECODE = "decode"


class _Rule(NamedTuple):
    """A span from one actor's stamp to another's; it exists when both do."""

    name: str
    part: Part
    start: tuple[_Actor, str]
    end: tuple[_Actor, str]


_G, _P, _D = _Actor.GATEWAY, _Actor.PROMPT, _Actor.DECODE
_BEFORE_ROUTE = (
    _Rule("read body", Part.PROMPT, (_G, "arrived"), (_G, "read")),
    _Rule("tokenize", Part.PROMPT, (_G, "read"), (_G, "tokenized")),
    _Rule("accept", Part.PROMPT, (_G, "tokenized"), (_G, "received")),
    _Rule("wait for its turn", Part.PROMPT, (_G, "received"), (_G, "admitted")),
)
_AFTER_ROUTE = (
    _Rule("submit", Part.PROMPT, (_G, "routed"), (_P, "queued")),
    _Rule("queue", Part.PROMPT, (_P, "queued"), (_P, "scheduled")),
    _Rule("prefill", Part.PROMPT, (_P, "scheduled"), (_P, "prompt_computed")),
    _Rule("emit", Part.PROMPT, (_P, "prompt_computed"), (_P, "first_token")),
    _Rule("first token", Part.PROMPT, (_P, "first_token"), (_G, "first_token")),
    _Rule("send", Part.PROMPT, (_G, "first_token"), (_G, "first_sent")),
    _Rule("ticket", Part.HANDOFF, (_P, "scheduled"), (_G, "ticket")),
    _Rule("pass ticket on", Part.HANDOFF, (_G, "ticket"), (_D, "queued")),
    _Rule("wait for blocks", Part.HANDOFF, (_D, "queued"), (_D, "fetching")),
    _Rule("attach", Part.HANDOFF, (_D, "fetching"), (_D, "attached")),
    _Rule("await region", Part.HANDOFF, (_D, "attached"), (_D, "first_pull")),
    _Rule("pull", Part.HANDOFF, (_D, "first_pull"), (_D, "last_pull")),
    _Rule("release", Part.HANDOFF, (_D, "last_pull"), (_D, "released")),
    _Rule("join batch", Part.HANDOFF, (_D, "released"), (_D, "fetched")),
    _Rule("second token", Part.ANSWER, (_D, "fetched"), (_G, "second_token")),
)
_DECODE = _Rule("decode", Part.ANSWER, (_G, "first_token"), (_G, "finished"))
_DECODE_AFTER_HANDOFF = _Rule("decode", Part.ANSWER, (_G, "second_token"), (_G, "finished"))


def spans(record: RequestRecord) -> list[Span]:
    """All spans the record has both ends of, attempts that failed included, by part and start."""
    moments = _moments(record)
    handed_over = (_D, "fetched") in moments
    rules = (*_BEFORE_ROUTE, *_AFTER_ROUTE, _DECODE_AFTER_HANDOFF if handed_over else _DECODE)
    found = [span for rule in rules if (span := _span(rule, moments, record))]
    if record.failed:
        # A replay's engine computes long after the first token went out.
        found = [span for span in found if span.seconds >= 0]
    found += (*_routing(record), *_migrations(record))
    return sorted(found, key=lambda span: (list(Part).index(span.part), span.start))


def total(record: RequestRecord) -> float | None:
    """Seconds from the first stamp to the end, None while the request runs."""
    times = dict(record.stamps)
    return times["finished"] - record.stamps[0][1] if "finished" in times else None


def covered(found: Iterable[Span]) -> float:
    """Seconds that lie in at least one span."""
    seconds, reached = 0.0, float("-inf")
    for span in sorted(found, key=lambda span: span.start):
        seconds += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return seconds


def _moments(record: RequestRecord) -> dict[tuple[_Actor, str], float]:
    moments = {(_G, name): unix for name, unix in record.stamps}
    for actor, trace in ((_P, record.prompt_trace), (_D, record.decode_trace)):
        if trace is not None:
            moments |= {(actor, name): unix for name, unix in trace.stamps}
    if record.prefill_trace is None:
        # The prompt engine decodes as well; nothing waited for blocks of a handoff.
        moments = {key: unix for key, unix in moments.items() if key[0] is not _D}
    return moments


def _span(rule: _Rule, moments: dict[tuple[_Actor, str], float], record: RequestRecord) -> Span | None:
    if rule.start not in moments or rule.end not in moments:
        return None
    places = [_place(actor, record) for actor, _ in (rule.start, rule.end)]
    where = places[0] if places[0] == places[1] else " → ".join(places)
    return Span(name=rule.name, part=rule.part, where=where, start=moments[rule.start], end=moments[rule.end])


def _place(actor: _Actor, record: RequestRecord) -> str:
    trace = {_P: record.prompt_trace, _D: record.decode_trace}.get(actor)
    return trace.engine_id if trace else "gateway"


def _migrations(record: RequestRecord) -> Iterator[Span]:
    """Each move from being asked to its target's first token; the source decodes on for most of it."""
    for move in record.migrations:
        if move.ended is not None:
            name = "migrate" if move.outcome == "ok" else f"migrate: {move.outcome}"
            where = f"{move.source} → {move.target}"
            yield Span(name=name, part=Part.ANSWER, where=where, start=move.asked, end=move.ended)


def _routing(record: RequestRecord) -> Iterator[Span]:
    """Choosing a route, and each attempt that failed, in turn."""
    times = dict(record.stamps)
    start = times.get("admitted", times.get("received"))
    routed = [unix for name, unix in record.stamps if name == "routed"]
    for number, chosen in enumerate(routed):
        if start is not None:
            name = "route again" if number else "route"
            yield Span(name=name, part=Part.PROMPT, where="gateway", start=start, end=chosen)
        if number < len(record.failed):
            failed = record.failed[number]
            engines = " → ".join(dict.fromkeys((failed.route.prefill.engine_id, failed.route.decode.engine_id)))
            yield Span(name=LOST + failed.code, part=Part.PROMPT, where=engines, start=chosen, end=failed.unix)
            start = failed.unix
