"""A record in full, for whoever asks why a request took the way and the time it did. Holds no prompt text."""

from pdserve.core.cluster import Candidate, Prediction, Route
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.timeline import covered, spans, total

RUNNING = "running"
_PREDICTED = ("ttft", "handoff_gap", "tpot", "cost")


def explain(record: RequestRecord) -> dict[str, object]:
    """JSON-ready: the record as clients get it, how the route was chosen, and the timeline.

    Timeline offsets and all durations are in seconds; offsets count from the first stamp. unaccounted_seconds
    is the part of the total in no span."""
    timeline, whole = spans(record), total(record)
    origin = record.stamps[0][1] if record.stamps else 0.0
    return record.to_dict() | {
        "client_request_id": record.client_id,
        "endpoint": record.endpoint,
        "status": record.status or RUNNING,
        "finish_reason": record.finish_reason,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "route": _route(record.route) if record.route else None,
        "total_seconds": whole,
        "unaccounted_seconds": max(0.0, whole - covered(timeline)) if whole is not None else None,
        "timeline": [
            {
                "name": span.name,
                "part": span.part.value,
                "where": span.where,
                "offset": span.start - origin,
                "seconds": span.seconds,
            }
            for span in timeline
        ],
    }


def _route(route: Route) -> dict[str, object]:
    return {
        "mode": route.mode.value,
        "prefill": route.prefill.engine_id,
        "decode": route.decode.engine_id,
        "reason": route.reason,
        "uncached_tokens": route.uncached_tokens,
        "prediction": _prediction(route.prediction),
        "alternatives": [_candidate(candidate) for candidate in route.alternatives],
    }


def _candidate(candidate: Candidate) -> dict[str, object]:
    return {
        "mode": candidate.mode.value,
        "prefill": candidate.prefill,
        "decode": candidate.decode,
        "cost": candidate.cost,
        "reason": candidate.reason,
        "prediction": _prediction(candidate.prediction),
    }


def _prediction(prediction: Prediction | None) -> dict[str, float] | None:
    return {name: getattr(prediction, name) for name in _PREDICTED} if prediction else None
