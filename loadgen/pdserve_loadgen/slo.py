"""Latency targets, how many requests met them, and the verdict."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.result import Outcome, RequestResult

DEFAULT_ATTAINMENT = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Upper bounds in seconds, each for a single request; None is no bound.

    itl bounds the request's longest gap. attainment: share of requests that must meet all bounds, (0, 1].
    """

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    e2e: float | None = None
    handoff_gap: float | None = None
    attainment: float = DEFAULT_ATTAINMENT

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """`ttft=0.5,tpot=0.05,attainment=0.9`. Raises UsageError."""
        names = [field.name for field in fields(cls)]
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in names or name in given:
                raise UsageError(f"--slo: {part!r} is not one of {', '.join(f'{n}=…' for n in names)}, each once")
            given[name] = _positive(name, value)
        if given.get("attainment", 1) > 1:
            raise UsageError("--slo: attainment is a share, at most 1")
        if given.keys() <= {"attainment"}:
            raise UsageError("--slo: give at least one bound, such as ttft=0.5 (seconds)")
        return cls(**given)

    def is_met_by(self, result: RequestResult) -> bool:
        """A failed request meets nothing; a bound on what a request does not have (TPOT of one token) is met."""
        if result.outcome is not Outcome.OK:
            return False
        longest_gap = max(result.gaps, default=None) if self.itl is not None else None
        measured = (
            (self.ttft, result.ttft),
            (self.tpot, result.tpot),
            (self.itl, longest_gap),
            (self.e2e, result.e2e),
            (self.handoff_gap, result.handoff_gap),
        )
        return all(bound is None or value is None or value <= bound for bound, value in measured)

    def __str__(self) -> str:
        bounds = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(f"{name}={value:g}" for name, value in bounds if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """judged counts every measured request but those the client cancelled; goodput is met per second."""

    slo: Slo
    judged: int
    met: int
    goodput: float

    @property
    def attainment(self) -> float:
        return self.met / self.judged if self.judged else 0.0

    @property
    def passed(self) -> bool:
        return self.judged > 0 and self.attainment >= self.slo.attainment


def judge(slo: Slo, results: Iterable[RequestResult], duration: float) -> Verdict:
    """The verdict on the measured requests of a run of `duration` seconds."""
    judged = [result for result in results if result.outcome is not Outcome.CANCELLED]
    met = sum(slo.is_met_by(result) for result in judged)
    return Verdict(slo=slo, judged=len(judged), met=met, goodput=met / duration if duration > 0 else 0.0)


def _positive(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UsageError(f"--slo: {name} must be a number above 0, not {value!r}")
    return number
