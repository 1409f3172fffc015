"""The record of one request: which way it went and when each thing happened.

Stamps are Unix seconds. Names and meanings: docs/request-lifecycle.md.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum

from pdserve.core.admission import Admission, Usage
from pdserve.core.cluster import Route
from pdserve.core.errors import PdserveError
from pdserve.core.request import EngineTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """One way that was tried and lost an engine or the link between two. unix: when it was given up.

    transfer_backend: what moved its KV, empty if nothing did or nobody could say any more."""

    route: Route
    code: str
    message: str
    emitted_tokens: int
    unix: float
    transfer_backend: str = ""


class MoveReason(StrEnum):
    """Why a running request moves: its engine drains, load evens out, or an operator asks for it."""

    DRAIN = "drain"
    REBALANCE = "rebalance"
    ORDER = "order"


@dataclass(slots=True, kw_only=True)
class Migration:
    """A running request's move from one engine to another, by their ids. why: the reason in figures, where it has any.

    asked and ended are when it began and was over (Unix). outcome is None while it is under way, then "ok" or the code
    of what it failed with. pause: seconds from the source's last word to the target's first token, as they arrived.
    trace: what the target did, once it has ended.
    """

    source: str
    target: str
    asked: float
    reason: MoveReason
    why: str = ""
    ended: float | None = None
    outcome: str | None = None
    pause: float | None = None
    trace: EngineTrace | None = None


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Filled in while a request runs: route, attempts and traces by dispatch, the rest by the gateway.

    route and traces are those of the last attempt, its decode_trace that of the engine that decoded first; failed
    holds the attempts before it, migrations the moves of all. admission is how it came in, usage what it took of the
    cluster, once it has ended. client_id is what the client calls the request, traceparent the W3C header it came with.
    status is None until the request has ended, then "ok" or the code of its error.
    """

    request_id: str
    client_id: str = ""
    endpoint: str = ""
    traceparent: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    status: str | None = None
    finish_reason: str | None = None
    admission: Admission | None = None
    usage: Usage | None = None
    route: Route | None = None
    failed: list[FailedAttempt] = field(default_factory=list)
    migrations: list[Migration] = field(default_factory=list)
    prefill_trace: EngineTrace | None = None
    decode_trace: EngineTrace | None = None
    stamps: list[tuple[str, float]] = field(default_factory=list)

    def give_up(self, error: PdserveError, emitted_tokens: int, unix: float) -> None:
        """The current attempt failed; another one follows."""
        if self.route is not None:
            self.failed.append(
                FailedAttempt(
                    route=self.route,
                    code=error.code,
                    message=str(error),
                    emitted_tokens=emitted_tokens,
                    unix=unix,
                    transfer_backend=self.decode_trace.transfer_backend if self.decode_trace else "",
                )
            )
        self.route = self.prefill_trace = self.decode_trace = None

    def stamp(self, name: str, unix: float) -> None:
        self.stamps.append((name, unix))

    @property
    def prompt_trace(self) -> EngineTrace | None:
        """The trace of the engine that computed the prompt."""
        return self.prefill_trace or self.decode_trace

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found rather than computed."""
        return self.prompt_trace.cached_tokens if self.prompt_trace else 0

    @property
    def handoff_gap(self) -> float | None:
        """Seconds from the first token's arrival to the second's, None unless disaggregated."""
        times = dict(self.stamps)
        if self.prefill_trace is None or self.decode_trace is None:
            return None
        if "second_token" not in times or "first_token" not in times:
            return None
        return times["second_token"] - times["first_token"]

    def durations(self) -> dict[str, float]:
        """Seconds by stage, of the last attempt: those of queue, prefill, transfer and decode that took place.

        queue and prefill are the prompt engine's, transfer and decode the decode engine's; they overlap when
        KV moves while later chunks are computed."""
        prompt = dict(self.prompt_trace.stamps) if self.prompt_trace else {}
        decode = dict(self.decode_trace.stamps) if self.decode_trace else {}
        stages = (
            ("queue", prompt.get("queued"), prompt.get("scheduled")),
            ("prefill", prompt.get("scheduled"), prompt.get("first_token")),
            ("transfer", decode.get("attached"), decode.get("released")),
            ("decode", decode.get("fetched", decode.get("first_token")), decode.get("finished")),
        )
        return {name: end - start for name, start, end in stages if start is not None and end is not None}

    def to_dict(self) -> dict[str, object]:
        """JSON-ready. Epochs are decimal strings: they exceed what JSON numbers carry exactly."""
        decode = self.decode_trace
        return {
            "request_id": self.request_id,
            "mode": self.route.mode.value if self.route else None,
            "reason": self.route.reason if self.route else None,
            "prefill": _engine(self.prefill_trace),
            "decode": _engine(decode),
            "cached_tokens": self.cached_tokens,
            "transfer": {
                "backend": decode.transfer_backend,
                "bytes": decode.transfer_bytes,
                "pulls": decode.transfer_pulls,
                "mode": decode.transfer_mode,
                "forecast_seconds": dict(decode.transfer_forecast),
                "stage_seconds": dict(decode.transfer_stages),
                "failovers": [{"backend": name, "code": code} for name, code in decode.transfer_failovers],
            }
            if decode and decode.transfer_backend
            else None,
            "fetch": _fetch(self.route, self.prompt_trace),
            "admission": _admission(self.admission),
            "handoff_gap": self.handoff_gap,
            "durations": self.durations(),
            "migrations": [_migration(migration) for migration in self.migrations],
            "failed_attempts": [_failed(attempt) for attempt in self.failed],
            "stamps": dict(self.stamps),
        }


def _admission(admission: Admission | None) -> dict[str, object] | None:
    if admission is None:
        return None
    return asdict(admission) | {"rejection": admission.rejection.value if admission.rejection else None}


def _engine(trace: EngineTrace | None) -> dict[str, object] | None:
    if trace is None:
        return None
    return {
        "engine": trace.engine_id,
        "epoch": str(trace.epoch),
        "cached_tokens": trace.cached_tokens,
        "stamps": [[name, unix] for name, unix in trace.stamps],
    }


def _fetch(route: Route | None, trace: EngineTrace | None) -> dict[str, object] | None:
    """The fetch of the prompt's beginning from another engine's cache that was planned, and what came of it: nothing
    where the engine no longer needed it, or had not ended it with the request."""
    if route is None or route.fetch is None:
        return None
    plan, done = route.fetch, trace.fetch if trace else None
    return {
        "source": plan.source.engine_id,
        "planned_tokens": plan.tokens,
        "predicted_seconds": plan.seconds,
        "saved_seconds": plan.saved_seconds,
        "tokens": done.tokens if done else 0,
        "bytes": done.num_bytes if done else 0,
        "seconds": done.seconds if done else None,
        "restore_seconds": done.restore_seconds if done else None,
        "backend": done.backend if done else "",
        "error": done.error if done else "",
    }


def _migration(migration: Migration) -> dict[str, object]:
    trace = migration.trace
    return {
        "from": migration.source,
        "to": migration.target,
        "reason": migration.reason.value,
        "why": migration.why,
        "outcome": migration.outcome,
        "asked": migration.asked,
        "ended": migration.ended,
        "pause": migration.pause,
        "backend": trace.transfer_backend if trace else "",
        "bytes": trace.transfer_bytes if trace else 0,
        "stamps": [[name, unix] for name, unix in trace.stamps] if trace else [],
    }


def _failed(attempt: FailedAttempt) -> dict[str, object]:
    return {
        "mode": attempt.route.mode.value,
        "prefill": attempt.route.prefill.engine_id,
        "decode": attempt.route.decode.engine_id,
        "code": attempt.code,
        "message": attempt.message,
        "emitted_tokens": attempt.emitted_tokens,
        "unix": attempt.unix,
    }
