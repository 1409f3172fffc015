"""One OpenTelemetry trace per request, built from its record once it has ended.

The root span is the request in the gateway; below it lie prefill, transfer and decode on their engines, and each
attempt that was lost. Attributes are names and numbers: never what was asked or said.
"""

import re
from collections.abc import Iterator
from random import Random

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from pdserve.core.request import EngineTrace
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.timeline import LOST, spans

Attributes = dict[str, AttributeValue]
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


def parent_of(traceparent: str) -> SpanContext | None:
    """The caller's span as its W3C header names it; None without a valid header."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    trace_id, span_id, flags = int(found[2], 16), int(found[3], 16), int(found[4], 16)
    if not trace_id or not span_id:
        return None
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))


def wanted(record: RequestRecord) -> bool:
    """Whether the caller traces this request; without a caller's decision every request is traced."""
    parent = parent_of(record.traceparent)
    return parent is None or parent.trace_flags.sampled


def build_spans(record: RequestRecord, resource: Resource, random: Random) -> list[ReadableSpan]:
    """The trace of a request that has ended, root first. random draws the ids."""
    parent = parent_of(record.traceparent)
    trace_id = parent.trace_id if parent else random.getrandbits(128) or 1

    def context() -> SpanContext:
        return SpanContext(trace_id, random.getrandbits(64) or 1, is_remote=False, trace_flags=_SAMPLED)

    start, end = record.stamps[0][1], max(unix for _, unix in record.stamps)
    root = ReadableSpan(
        name=record.endpoint or "request",
        context=context(),
        parent=parent,
        resource=resource,
        attributes=_request_attributes(record),
        kind=SpanKind.SERVER,
        status=Status(StatusCode.OK) if record.status == "ok" else Status(StatusCode.ERROR, record.status),
        start_time=_nanoseconds(start),
        end_time=_nanoseconds(end),
    )
    children = [
        ReadableSpan(
            name=name,
            context=context(),
            parent=root.context,
            resource=resource,
            attributes=attributes,
            status=Status(StatusCode.ERROR) if "error.type" in attributes else Status(StatusCode.UNSET),
            start_time=_nanoseconds(begin),
            end_time=_nanoseconds(stop),
        )
        for name, begin, stop, attributes in (*_lost(record), *_stages(record))
    ]
    return [root, *children]


def _stages(record: RequestRecord) -> Iterator[tuple[str, float, float, Attributes]]:
    for trace, stages in (
        (record.prompt_trace, (("prefill", "queued", "first_token"),)),
        (record.decode_trace, (("transfer", "fetching", "fetched"), ("decode", "fetched", "finished"))),
        (
            record.decode_trace if record.prefill_trace is None else None,
            (("decode", "first_token", "finished"),),
        ),
    ):
        times = dict(trace.stamps) if trace else {}
        for name, start, end in stages:
            if trace and start in times and end in times:
                yield name, times[start], times[end], _engine_attributes(trace, name)


def _lost(record: RequestRecord) -> Iterator[tuple[str, float, float, Attributes]]:
    for span in spans(record):
        if span.name.startswith(LOST):
            code = span.name.removeprefix(LOST)
            yield "lost attempt", span.start, span.end, {"pdserve.engines": span.where, "error.type": code}


def _engine_attributes(trace: EngineTrace, stage: str) -> Attributes:
    attributes: Attributes = {"pdserve.engine.id": trace.engine_id, "pdserve.engine.epoch": str(trace.epoch)}
    if stage == "prefill":
        attributes["pdserve.cached_tokens"] = trace.cached_tokens
    if stage == "transfer":
        attributes["pdserve.transfer.backend"] = trace.transfer_backend
        attributes["pdserve.transfer.bytes"] = trace.transfer_bytes
        attributes["pdserve.transfer.pulls"] = trace.transfer_pulls
        attributes["pdserve.transfer.mode"] = trace.transfer_mode
        attributes["pdserve.transfer.failovers"] = len(trace.transfer_failovers)
    return attributes


def _request_attributes(record: RequestRecord) -> Attributes:
    """Where OpenTelemetry has a name for a thing, that name."""
    attributes: Attributes = {
        "pdserve.request_id": record.request_id,
        "pdserve.client_request_id": record.client_id,
        "pdserve.replays": len(record.failed),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.response.finish_reasons": (record.finish_reason,) if record.finish_reason else (),
    }
    if record.route is not None:
        attributes["pdserve.mode"] = record.route.mode.value
        attributes["pdserve.route.reason"] = record.route.reason
    if record.status not in (None, "ok"):
        attributes["error.type"] = str(record.status)
    return attributes


def _nanoseconds(unix: float) -> int:
    return round(unix * 1e9)
