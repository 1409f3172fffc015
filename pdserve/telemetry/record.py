"""The record of one request: which way it went and when each thing happened.

Stamps are Unix seconds. Names and meanings: docs/request-lifecycle.md.
"""

from dataclasses import dataclass, field

from pdserve.core.cluster import Route
from pdserve.core.errors import PdserveError
from pdserve.core.request import EngineTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """One way that was tried and lost an engine or the link between two. unix: when it was given up."""

    route: Route
    code: str
    message: str
    emitted_tokens: int
    unix: float


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Filled in by dispatch while a request runs; read by the gateway when it has ended.

    route and traces are those of the last attempt; failed holds the attempts before it.
    """

    request_id: str
    route: Route | None = None
    failed: list[FailedAttempt] = field(default_factory=list)
    prefill_trace: EngineTrace | None = None
    decode_trace: EngineTrace | None = None
    stamps: list[tuple[str, float]] = field(default_factory=list)

    def give_up(self, error: PdserveError, emitted_tokens: int, unix: float) -> None:
        """The current attempt failed; another one follows."""
        if self.route is not None:
            self.failed.append(
                FailedAttempt(
                    route=self.route, code=error.code, message=str(error), emitted_tokens=emitted_tokens, unix=unix
                )
            )
        self.route = self.prefill_trace = self.decode_trace = None

    def stamp(self, name: str, unix: float) -> None:
        self.stamps.append((name, unix))

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found rather than computed."""
        trace = self.prefill_trace or self.decode_trace
        return trace.cached_tokens if trace else 0

    @property
    def handoff_gap(self) -> float | None:
        """Seconds from the first token's arrival to the second's, None unless disaggregated."""
        times = dict(self.stamps)
        if self.prefill_trace is None or self.decode_trace is None:
            return None
        if "second_token" not in times or "first_token" not in times:
            return None
        return times["second_token"] - times["first_token"]

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
            }
            if decode and decode.transfer_backend
            else None,
            "handoff_gap": self.handoff_gap,
            "failed_attempts": [_failed(attempt) for attempt in self.failed],
            "stamps": dict(self.stamps),
        }


def _engine(trace: EngineTrace | None) -> dict[str, object] | None:
    if trace is None:
        return None
    return {
        "engine": trace.engine_id,
        "epoch": str(trace.epoch),
        "cached_tokens": trace.cached_tokens,
        "stamps": [[name, unix] for name, unix in trace.stamps],
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
