"""Judges a run under faults from what both sides wrote down, after the fact."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientEvent:
    """One request as its client saw it end. answer_hash is over text and log probabilities."""

    id: str
    ask: int
    finish_reasons: tuple[str, ...]
    answer_hash: str
    error: str
    failed_attempts: int
    longest_pause: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """faulted counts requests that lost an engine or link at least once. The lists name requests."""

    requests: int
    faulted: int
    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)


def judge(clients: Iterable[ClientEvent], server_log: Iterable[str], wanted: list[str]) -> Verdict:
    """clients: one event per request sent; server_log: the gateway's JSON lines, whatever else is among
    them; wanted: the answer hash of each ask, undisturbed."""
    events = list(clients)
    ends = Counter(_ended_request(line) for line in server_log)
    seen = Counter(event.id for event in events)
    return Verdict(
        requests=len(events),
        faulted=sum(event.failed_attempts > 0 for event in events),
        lost=tuple(e.id for e in events if not e.finish_reasons or not ends[e.id]),
        doubled=tuple(e.id for e in events if len(e.finish_reasons) > 1 or ends[e.id] > 1 or seen[e.id] > 1),
        wrong=tuple(e.id for e in events if e.finish_reasons and e.answer_hash != wanted[e.ask]),
    )


def _ended_request(line: str) -> str:
    """The client's id of the request whose end a log line reports, else an empty string."""
    start = line.find("{")
    if start < 0:
        return ""
    try:
        entry = json.loads(line[start:])
    except ValueError:
        return ""
    ended = isinstance(entry, dict) and entry.get("event") == "request"
    return str(entry.get("client_request_id") or "") if ended else ""
