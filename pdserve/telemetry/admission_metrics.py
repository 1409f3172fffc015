"""Metrics of admission and tenants, from requests' records."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.telemetry.record import RequestRecord

WAITING = "pdserve_admission_waiting_requests", "Requests that wait in the gateway to be let in.", ("tenant",)
REJECTIONS = (
    "pdserve_admission_rejections_total",
    'Requests that were not let in, by tenant and reason: "ttft", "deadline", "queue_full", "rate_limit" or '
    '"concurrency_limit".',
    ("tenant", "reason"),
)
WAIT = "pdserve_admission_wait_seconds", "From a request's arrival at the gate to its being let in."
PREFILL = (
    "pdserve_tenant_prefill_seconds_total",
    "Computing of prompts of ended requests, as the router reckons it.",
    ("tenant",),
)
KV = (
    "pdserve_tenant_kv_block_seconds_total",
    "Blocks of KV that ended requests held, times the seconds they held them.",
    ("tenant",),
)
LINK = "pdserve_tenant_link_bytes_total", "Bytes of KV moved between engines for ended requests.", ("tenant",)


class AdmissionMetrics:
    """Counted once per request, when it has ended."""

    def __init__(
        self, counter: Callable[[str, str, tuple[str, ...]], Counter], histogram: Callable[[str, str], Histogram]
    ) -> None:
        """counter and histogram make and register one."""
        self._wait = histogram(*WAIT)
        self._rejections = counter(*REJECTIONS)
        self._prefill = counter(*PREFILL)
        self._kv = counter(*KV)
        self._link = counter(*LINK)

    def count(self, record: RequestRecord) -> None:
        admission, usage = record.admission, record.usage
        if admission is None:
            return
        if admission.rejection:
            self._rejections.labels(admission.tenant, admission.rejection.value).inc()
        elif admission.waited is not None:
            self._wait.observe(admission.waited)
        if usage:
            self._prefill.labels(admission.tenant).inc(usage.prefill_seconds)
            self._kv.labels(admission.tenant).inc(usage.kv_block_seconds)
            self._link.labels(admission.tenant).inc(usage.link_bytes)


class WaitingCollector(Collector):
    """Reads how many requests wait, by tenant, at every scrape."""

    def __init__(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        self._waiting = waiting

    def describe(self) -> list[Metric]:
        return [_gauge()]

    def collect(self) -> Iterator[Metric]:
        gauge = _gauge()
        for tenant, count in self._waiting().items():
            gauge.add_metric([tenant], count)
        yield gauge


def _gauge() -> GaugeMetricFamily:
    name, documentation, labels = WAITING
    return GaugeMetricFamily(name, documentation, labels=labels)
