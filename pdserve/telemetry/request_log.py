"""The one log line of a request, written when it ends. Numbers and names only: never what was asked or said."""

import structlog

from pdserve.telemetry.record import RequestRecord

log = structlog.get_logger("pdserve.request")


def log_request(record: RequestRecord, latency: float, time_to_first_token: float | None) -> None:
    """Durations in seconds; a stage that did not take place, or did not end, is left out."""
    route, decode = record.route, record.decode_trace
    moved = decode if decode and decode.transfer_backend else None
    log.info(
        "request",
        request_id=record.request_id,
        client_request_id=record.client_id,
        endpoint=record.endpoint,
        status=record.status,
        finish_reason=record.finish_reason,
        mode=route.mode.value if route else None,
        prefill=route.prefill.engine_id if route else None,
        decode=route.decode.engine_id if route else None,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        output_tokens=record.output_tokens,
        replays=len(record.failed),
        migrations=len(record.migrations),
        transfer_backend=moved.transfer_backend if moved else None,
        transfer_bytes=moved.transfer_bytes if moved else 0,
        transfer_mode=moved.transfer_mode if moved else None,
        transfer_failovers=len(moved.transfer_failovers) if moved else 0,
        time_to_first_token=_rounded(time_to_first_token),
        handoff_gap=_rounded(record.handoff_gap),
        latency=_rounded(latency),
        **{f"{stage}_seconds": _rounded(seconds) for stage, seconds in record.durations().items()},
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
