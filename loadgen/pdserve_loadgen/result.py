"""What one request did: stamps, counts and outcome, and the measures that follow from them.

Stamps are seconds on one clock that starts with the run, real or simulated. Formulas: docs/benchmarking.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """OK: a complete answer. CANCELLED: the client hung up on purpose. ERROR: all else."""

    OK = "ok"
    ERROR = "error"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """One request as its client saw it.

    token_times: when each piece of the answer arrived; one piece is one token unless the server groups them.
    output_tokens: what the server counted (its usage), else the number of pieces.
    error: stable code of a failure, e.g. `http_503:engine_died`, `stream_broken`.
    request_id: what the server calls the request, if it said so.
    """

    id: str
    scheduled: float
    sent: float
    finished: float
    outcome: Outcome
    token_times: Sequence[float] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    request_id: str | None = None
    warmup: bool = False
    turn: int = 0

    @property
    def ttft(self) -> float | None:
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def e2e(self) -> float | None:
        """To the last token: what a server sends after it (usage, end mark) is not waited for."""
        return self.token_times[-1] - self.sent if self.token_times else None

    @property
    def tpot(self) -> float | None:
        if len(self.token_times) < 2 or self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """The request's ITLs: time between each piece and the next."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def handoff_gap(self) -> float | None:
        return self.token_times[1] - self.token_times[0] if len(self.token_times) > 1 else None

    @property
    def lateness(self) -> float:
        """How long after its time the generator sent it: the generator's own error, not the server's."""
        return self.sent - self.scheduled

    def to_dict(self) -> dict[str, object]:
        """One line of a record file, JSON-ready. Never a prompt or an answer."""
        return {
            "id": self.id,
            "turn": self.turn,
            "warmup": self.warmup,
            "outcome": self.outcome.value,
            "error": self.error,
            "request_id": self.request_id,
            "scheduled": self.scheduled,
            "sent": self.sent,
            "finished": self.finished,
            "token_times": list(self.token_times),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }
