"""Sending traces to a collector, in batches and off the event loop: a slow or absent collector costs no request.

Needs the extra `otel`; nothing imports this module unless telemetry.otlp_endpoint is set.
"""

import asyncio
from collections import deque
from random import Random, SystemRandom
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from pdserve.core.clock import Clock
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.trace_spans import build_spans, wanted

log = structlog.get_logger("pdserve.tracing")

CAPACITY = 2048
"""Traces that may wait; further ones are dropped and counted."""
BATCH = 256
_DELAY = 1.0
"""Seconds a trace waits for others to go with it."""
_EXPORT_TIMEOUT = 5.0
_RESOURCE = {"service.name": "pdserve"}


def otlp_exporter(endpoint: str) -> SpanExporter:
    """An exporter to an OTLP/HTTP collector; an endpoint without a path gets the standard one, /v1/traces."""
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
    return OTLPSpanExporter(endpoint=url, timeout=_EXPORT_TIMEOUT)


class TraceQueue:
    """Takes records of requests that have ended; `run` sends them until cancelled, then once more what waits.

    metrics.traces counts each record by what became of it: exported, failed or dropped."""

    def __init__(
        self,
        exporter: SpanExporter,
        metrics: Metrics,
        clock: Clock,
        *,
        capacity: int = CAPACITY,
        random: Random | None = None,
    ) -> None:
        self._exporter = exporter
        self._metrics = metrics
        self._clock = clock
        self._capacity = capacity
        self._random = random or SystemRandom()
        self._resource = Resource.create(dict(_RESOURCE))
        self._waiting: deque[RequestRecord] = deque()
        self._fresh = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def offer(self, record: RequestRecord) -> None:
        """Never blocks; drops the record when too many wait."""
        if not wanted(record):
            return
        if len(self._waiting) >= self._capacity:
            self._metrics.traces.labels("dropped").inc()
            return
        self._waiting.append(record)
        self._fresh.set()

    async def run(self) -> None:
        """Ends only by being cancelled; the last batch is then given one export's time."""
        try:
            while True:
                await self._fresh.wait()
                await self._clock.sleep(_DELAY)
                self._fresh.clear()
                while self._waiting:
                    await self._send()
        finally:
            if self._waiting:
                await self._send()
            self._metrics.traces.labels("dropped").inc(len(self._waiting))
            await asyncio.to_thread(self._exporter.shutdown)

    async def _send(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        sending, sent = asyncio.ensure_future(asyncio.to_thread(self._export, batch)), False
        try:
            sent = await asyncio.shield(sending)
        except asyncio.CancelledError:
            sent = await sending  # its thread cannot be stopped, and takes no longer than the export's timeout
            raise
        finally:
            self._metrics.traces.labels("exported" if sent else "failed").inc(len(batch))

    def _export(self, batch: list[RequestRecord]) -> bool:
        try:
            built = [span for record in batch for span in build_spans(record, self._resource, self._random)]
            return self._exporter.export(built) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("traces could not be exported", traces=len(batch))
            return False
