"""One trace per request, from the record; a collector that is slow or gone costs nothing but its traces."""

import asyncio
import threading
from collections.abc import Sequence
from random import Random

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pdserve.core.clock import SystemClock
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.trace_spans import build_spans, parent_of
from pdserve.telemetry.tracing import TraceQueue, otlp_exporter
from tests.collector import collecting
from tests.unit.telemetry.records import EPOCH, START, disaggregated, replayed, stamps

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


class ImpatientClock(SystemClock):
    """Waits for nothing, so that batches go at once."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def built(record: RequestRecord) -> dict[str, ReadableSpan]:
    return {span.name: span for span in build_spans(record, Resource.create({}), Random(1))}


def count(metrics: Metrics, result: str) -> float:
    return metrics.registry.get_sample_value("pdserve_traces_total", {"result": result}) or 0.0


async def sent(exporter: SpanExporter, records: Sequence[RequestRecord], capacity: int = 100) -> Metrics:
    """Metrics after everything offered has been dealt with."""
    metrics = Metrics()
    queue = TraceQueue(exporter, metrics, ImpatientClock(), capacity=capacity, random=Random(1))
    for record in records:
        queue.offer(record)
    task = asyncio.create_task(queue.run())
    async with asyncio.timeout(10):
        while sum(count(metrics, result) for result in ("exported", "failed", "dropped")) < len(records):
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return metrics


async def test_a_disaggregated_request_is_one_trace_over_gateway_and_engines() -> None:
    exporter = InMemorySpanExporter()
    metrics = await sent(exporter, [disaggregated()])
    root, *stages = exporter.get_finished_spans()
    assert root.context is not None
    assert [span.name for span in (root, *stages)] == ["completions", "prefill", "transfer", "decode"]
    assert {span.context.trace_id for span in stages if span.context} == {root.context.trace_id}
    assert all(span.parent and span.parent.span_id == root.context.span_id for span in stages)
    assert len({span.context.span_id for span in stages if span.context}) == 3
    assert count(metrics, "exported") == 1


def test_spans_name_their_engines_and_epochs_and_last_as_long_as_the_work_did() -> None:
    spans = built(disaggregated())
    engines = {name: (span.attributes or {}).get("pdserve.engine.id") for name, span in spans.items()}
    assert engines == {"completions": None, "prefill": "prefill-0", "transfer": "decode-0", "decode": "decode-0"}
    transfer = spans["transfer"]
    assert transfer.attributes is not None
    assert transfer.attributes["pdserve.engine.epoch"] == str(EPOCH)
    assert transfer.attributes["pdserve.transfer.bytes"] == 4096
    assert transfer.start_time == pytest.approx((START + 0.029) * 1e9)
    assert spans["completions"].end_time == pytest.approx((START + 0.105) * 1e9)
    assert spans["completions"].status.status_code is StatusCode.OK


def test_a_callers_trace_goes_on_here() -> None:
    record = disaggregated()
    record.traceparent = TRACEPARENT
    root = built(record)["completions"]
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert f"{root.parent.span_id:016x}" == SPAN_ID
    assert root.parent.is_remote


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-01-extra",
    ],
)
def test_a_header_that_is_not_w3c_begins_a_new_trace(header: str) -> None:
    assert parent_of(header) is None
    record = disaggregated()
    record.traceparent = header
    assert built(record)["completions"].parent is None


async def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    exporter = InMemorySpanExporter()
    unsampled = disaggregated("cmpl-1")
    unsampled.traceparent = f"00-{TRACE_ID}-{SPAN_ID}-00"
    queue = TraceQueue(exporter, Metrics(), ImpatientClock())
    queue.offer(unsampled)
    assert queue.num_waiting == 0
    queue.offer(disaggregated("cmpl-2"))
    assert queue.num_waiting == 1


def test_failures_and_lost_attempts_are_marked_as_errors() -> None:
    lost = built(replayed())["lost attempt"]
    assert lost.attributes is not None
    assert lost.attributes["error.type"] == "engine_died"
    assert lost.status.status_code is StatusCode.ERROR
    failed = RequestRecord(request_id="r", endpoint="completions", status="unavailable", stamps=stamps(("arrived", 0)))
    root = built(failed)["completions"]
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes is not None
    assert root.attributes["error.type"] == "unavailable"


async def test_a_full_queue_drops_and_counts_without_waiting() -> None:
    exporter = InMemorySpanExporter()
    metrics = await sent(exporter, [disaggregated(f"cmpl-{i}") for i in range(8)], capacity=3)
    assert (count(metrics, "exported"), count(metrics, "dropped")) == (3, 5)
    assert len(exporter.get_finished_spans()) == 3 * 4


class Broken(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise ConnectionError("no collector")


async def test_a_broken_collector_costs_only_its_traces() -> None:
    metrics = await sent(Broken(), [disaggregated(), disaggregated()])
    assert (count(metrics, "exported"), count(metrics, "failed")) == (0, 2)


class Stuck(SpanExporter):
    """Holds the first batch until released."""

    def __init__(self) -> None:
        self.started, self.release = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.started.set()
        assert self.release.wait(10)
        return SpanExportResult.SUCCESS


async def test_the_event_loop_goes_on_while_a_collector_dawdles() -> None:
    exporter, metrics = Stuck(), Metrics()
    queue = TraceQueue(exporter, metrics, ImpatientClock())
    queue.offer(disaggregated())
    task = asyncio.create_task(queue.run())
    assert await asyncio.to_thread(exporter.started.wait, 10)
    queue.offer(disaggregated())
    assert (queue.num_waiting, count(metrics, "exported")) == (1, 0)
    exporter.release.set()
    async with asyncio.timeout(10):
        while count(metrics, "exported") < 2:
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_collector_receives_the_trace_over_http_and_no_text() -> None:
    with collecting() as collector:
        metrics = await sent(otlp_exporter(collector.endpoint), [disaggregated("cmpl-wire")])
        spans = collector.spans()
    assert count(metrics, "exported") == 1
    assert [span.name for span in spans] == ["completions", "prefill", "transfer", "decode"]
    names = {attribute.key for span in spans for attribute in span.attributes}
    assert {"pdserve.request_id", "pdserve.engine.id", "gen_ai.usage.input_tokens"} <= names
    assert not {name for name in names if "prompt" in name or "message" in name or "content" in name}


async def test_what_waits_when_the_server_ends_is_still_sent() -> None:
    exporter, metrics = InMemorySpanExporter(), Metrics()
    queue = TraceQueue(exporter, metrics, SystemClock())
    task = asyncio.create_task(queue.run())
    queue.offer(disaggregated())
    await asyncio.sleep(0.05)
    assert not exporter.get_finished_spans()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert count(metrics, "exported") == 1
