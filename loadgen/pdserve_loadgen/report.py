"""The report of a run, from the results of its requests alone: the same for a real server and a simulated one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pdserve_loadgen.percentiles import Distribution
from pdserve_loadgen.result import Outcome, RequestResult
from pdserve_loadgen.slo import Slo, Verdict, judge

__all__ = ["Distribution", "Outcome", "Report", "RequestResult", "Slo", "Verdict", "build_report"]

SCHEMA = "pdserve-loadgen/1"

LATENESS_FLOOR = 0.005
LATENESS_SHARE = 0.1
GROUPED_TOKENS = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Latencies in seconds, rates per second, over the measured requests (warm-up excluded).

    Latencies are of complete answers only. duration runs from the first sending to the last end.
    errors: code → count. notes: what a reader must know before trusting the figures.
    """

    title: str
    duration: float
    requests: int
    succeeded: int
    failed: int
    cancelled: int
    warmup: int
    errors: dict[str, int]
    input_tokens: int
    output_tokens: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    handoff_gap: Distribution | None
    input_lengths: Distribution | None
    output_lengths: Distribution | None
    lateness: Distribution | None
    request_throughput: float
    input_throughput: float
    output_throughput: float
    verdict: Verdict | None
    notes: tuple[str, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """The targets were met; without targets, at least one request was answered."""
        return self.verdict.passed if self.verdict else self.succeeded > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        body = asdict(self)
        if self.verdict:
            body["verdict"] |= {"attainment": self.verdict.attainment, "passed": self.verdict.passed}
        return {"schema": SCHEMA, **body, "passed": self.passed}


def build_report(
    results: Iterable[RequestResult],
    *,
    title: str,
    slo: Slo | None = None,
    notes: Sequence[str] = (),
    settings: dict[str, object] | None = None,
) -> Report:
    """settings: what the run was asked to do, repeated in the JSON so that it can be done again."""
    everything = list(results)
    measured = [result for result in everything if not result.warmup]
    complete = [result for result in measured if result.outcome is Outcome.OK]
    answered = [result for result in measured if result.outcome is not Outcome.ERROR]
    duration = max((r.finished for r in measured), default=0.0) - min((r.sent for r in measured), default=0.0)
    lateness = Distribution.of(result.lateness for result in measured)
    ttft = Distribution.of(_known(result.ttft for result in complete))
    output_tokens = sum(result.output_tokens for result in measured)
    input_tokens = sum(result.input_tokens for result in answered)
    return Report(
        title=title,
        duration=duration,
        requests=len(measured),
        succeeded=len(complete),
        failed=len(measured) - len(answered),
        cancelled=len(answered) - len(complete),
        warmup=len(everything) - len(measured),
        errors=dict(sorted(Counter(result.error for result in measured if result.error).items())),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        ttft=ttft,
        tpot=Distribution.of(_known(result.tpot for result in complete)),
        itl=Distribution.of(gap for result in complete for gap in result.gaps),
        e2e=Distribution.of(_known(result.e2e for result in complete)),
        handoff_gap=Distribution.of(_known(result.handoff_gap for result in complete)),
        input_lengths=Distribution.of(float(result.input_tokens) for result in complete),
        output_lengths=Distribution.of(float(result.output_tokens) for result in complete),
        lateness=lateness,
        request_throughput=_rate(len(complete), duration),
        input_throughput=_rate(input_tokens, duration),
        output_throughput=_rate(output_tokens, duration),
        verdict=judge(slo, measured, duration) if slo else None,
        notes=(*notes, *_warnings(complete, lateness, ttft)),
        settings=settings or {},
    )


def _warnings(complete: Sequence[RequestResult], lateness: Distribution | None, ttft: Distribution | None) -> list[str]:
    """What makes the figures mean something else than they seem to."""
    warnings = []
    if lateness and lateness.p99 > max(LATENESS_FLOOR, LATENESS_SHARE * (ttft.p50 if ttft else 0.0)):
        warnings.append(
            f"the generator itself was late: p99 {lateness.p99 * 1e3:.1f} ms after schedule; "
            "the load was lower and smoother than asked for: lower the rate or give it more CPU"
        )
    pieces = sum(len(result.token_times) for result in complete)
    tokens = sum(result.output_tokens for result in complete)
    if pieces and tokens > GROUPED_TOKENS * pieces:
        warnings.append(
            f"the server sent {tokens / pieces:.2f} tokens per event: "
            "ITL and handoff gap are between events, not tokens"
        )
    return warnings


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rate(amount: float, duration: float) -> float:
    return amount / duration if duration > 0 else 0.0
