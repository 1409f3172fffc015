"""Every metric pdserve exports, by name, in one place. Units are in the names, in seconds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import Role
from pdserve.core.errors import Cancelled, TransferError
from pdserve.core.request import EngineTrace, PrefixFetch
from pdserve.telemetry.admission_metrics import WAITING, AdmissionMetrics, WaitingCollector
from pdserve.telemetry.index_metrics import INDEX_METRICS, IndexCollector, IndexSizes
from pdserve.telemetry.record import Migration, RequestRecord
from pdserve.telemetry.router_metrics import OTHER_ROUTERS, REDIS_UP, RouterMetrics
from pdserve.telemetry.scaler_metrics import SCALER_METRICS, ScalerCollector, ScalerFigures
from pdserve.telemetry.tier_metrics import TIER_METRICS, tier_families
from pdserve.telemetry.totals import Series, Totals
from pdserve.telemetry.vllm_names import VllmNames

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)

_TRANSFER_STAGES = (
    ("queue", "Of one handoff: pulls waiting for the backend's thread, summed over its pulls."),
    ("post", "Of one handoff: in the calls that started its reads, which do all of them where the kernel copies."),
    ("wire", "Of one handoff: from a read's start to its last byte, summed over its pulls."),
    ("verify", "Of one handoff: digests of what arrived, summed over its pulls."),
)

_TRANSFER_ERRORS = frozenset({TransferError.code, *(kind.code for kind in TransferError.__subclasses__())})


class Description(NamedTuple):
    """One metric, as docs/metrics.md lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    documentation: str


class Metrics:
    """The instruments of one process, on a registry of their own.

    A request that began is counted once in requests, when it ends, by endpoint and status ("ok" or the code
    of its error). One answered with an error instead of any output, begun or not, is counted in rejections.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.described: list[Description] = [
            Description(family.name, family.type, labels, family.documentation)
            for family, labels in zip(_engine_gauges(), _ENGINE_LABELS, strict=True)
        ]
        self.described += [
            Description(name, kind, labels, documentation) for name, kind, documentation, labels, _ in TIER_METRICS
        ]
        self.described += [
            Description(name, kind, labels, documentation) for name, kind, documentation, labels in INDEX_METRICS
        ]
        self.described += [
            Description(name, kind, labels, documentation) for name, kind, documentation, labels in SCALER_METRICS
        ]
        waiting, documentation, labels = WAITING
        self.described.append(Description(waiting, "gauge", labels, documentation))
        self.admission = AdmissionMetrics(
            self._counter, lambda name, documentation: self._histogram(name, documentation, _REQUEST_BUCKETS)
        )
        for name, documentation in (REDIS_UP, OTHER_ROUTERS):
            self.described.append(Description(name, "gauge", (), documentation))
        self.routers = RouterMetrics(self.registry, self._counter)
        self.time_to_first_token = self._histogram(
            "pdserve_time_to_first_token_seconds", "From the request's arrival to its first token.", _REQUEST_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "pdserve_inter_token_latency_seconds", "Between two tokens of a request, as they arrive.", _TOKEN_BUCKETS
        )
        self.request_latency = self._histogram(
            "pdserve_e2e_request_latency_seconds", "From a request's arrival to its last token.", _REQUEST_BUCKETS
        )
        self.handoff_gap = self._histogram(
            "pdserve_handoff_gap_seconds", "From token 1 to token 2 of a disaggregated request.", _TOKEN_BUCKETS
        )
        self.stages = {
            "queue": self._histogram(
                "pdserve_queue_seconds", "From an engine's accepting a prompt to its first chunk.", _TOKEN_BUCKETS
            ),
            "prefill": self._histogram(
                "pdserve_prefill_seconds", "From a prompt's first chunk to its first token.", _REQUEST_BUCKETS
            ),
            "transfer": self._histogram(
                "pdserve_transfer_seconds", "From asking for a prompt's KV to having it verified.", _TOKEN_BUCKETS
            ),
            "decode": self._histogram(
                "pdserve_decode_seconds", "From joining the decode batch to leaving it.", _REQUEST_BUCKETS
            ),
        }
        self.transfers = self._counter(
            "pdserve_transfers_total",
            'KV handoffs by backend and result: "ok" or the code of the error.',
            ("backend", "result"),
        )
        self.transferred_bytes = self._counter(
            "pdserve_transferred_bytes_total", "Bytes of KV pulled and verified.", ("backend",)
        )
        self.transfer_stages = {
            stage: self._histogram(f"pdserve_transfer_{stage}_seconds", documentation, _TOKEN_BUCKETS)
            for stage, documentation in _TRANSFER_STAGES
        }
        self.transfer_modes = self._counter(
            "pdserve_transfer_modes_total",
            "KV handoffs pulled while the prompt was computed (progressive) or when it was complete (bulk).",
            ("mode",),
        )
        self.transfer_failovers = self._counter(
            "pdserve_transfer_failovers_total",
            "Reads that failed and that another backend took over, by the one that failed and the error code.",
            ("backend", "cause"),
        )
        self.prefix_fetches = self._counter(
            "pdserve_prefix_fetches_total",
            "Fetches of a prompt's beginning from another engine's cache, by result: \"ok\" or the code of the error "
            "after which it was computed.",
            ("result",),
        )
        self.prefix_fetched_tokens = self._counter(
            "pdserve_prefix_fetched_tokens_total", "Prompt tokens whose KV was fetched from another engine's cache."
        )
        self.prefix_fetch = self._histogram(
            "pdserve_prefix_fetch_seconds",
            "From asking another engine for a prompt's beginning to having it verified.",
            _TOKEN_BUCKETS,
        )
        self.replays = self._counter(
            "pdserve_replays_total", "Attempts given up and made again elsewhere, by error code.", ("reason",)
        )
        self.migrations = self._counter(
            "pdserve_migrations_total",
            'Moves of running requests between engines, by outcome ("ok" or the code of the error) and reason '
            '("drain", "rebalance" or "order").',
            ("outcome", "reason"),
        )
        self.migration_pause = self._histogram(
            "pdserve_migration_pause_seconds",
            "From a moving request's last token of one engine to its first of the other.",
            _TOKEN_BUCKETS,
        )
        self.policy_errors = self._counter(
            "pdserve_policy_errors_total",
            "Routes chosen by kv_aware because the configured policy failed, by exception.",
            ("error",),
        )
        self.traces = self._counter(
            "pdserve_traces_total",
            'Traces by result: "exported", "failed" or, when too many wait, "dropped".',
            ("result",),
        )
        self.engine_restarts = self._counter(
            "pdserve_engine_restarts_total", "New incarnations of an engine that had been there.", ("engine",)
        )
        self.quarantine_drains = self._counter(
            "pdserve_quarantine_drains_total",
            "Incarnations of an engine that drained to start again because too many of its KV blocks stayed in "
            "quarantine.",
            ("engine",),
        )
        self.late_heartbeats = self._counter(
            "pdserve_late_heartbeats_total", "Times an engine fell silent and became suspect.", ("engine",)
        )
        self.requests = self._counter(
            "pdserve_requests_total", "Requests that ended, by endpoint and status.", ("endpoint", "status")
        )
        self.rejections = self._counter(
            "pdserve_rejections_total", "Requests answered with an error and no output, by error code.", ("reason",)
        )
        self.prompt_tokens = self._counter("pdserve_prompt_tokens_total", "Prompt tokens of ended requests.")
        self.cached_tokens = self._counter(
            "pdserve_cached_prompt_tokens_total", "Prompt tokens whose KV was found in a cache."
        )
        self.output_tokens = self._counter("pdserve_output_tokens_total", "Tokens generated.")

    def count(self, record: RequestRecord) -> None:
        """Everything a request's record tells, once, when the request has ended."""
        self.requests.labels(record.endpoint, record.status).inc()
        self.admission.count(record)
        self.prompt_tokens.inc(record.prompt_tokens)
        self.cached_tokens.inc(record.cached_tokens)
        self.output_tokens.inc(record.output_tokens)
        if record.handoff_gap is not None:
            self.handoff_gap.observe(record.handoff_gap)
        for stage, seconds in record.durations().items():
            self.stages[stage].observe(seconds)
        for route in (record.route, *(attempt.route for attempt in record.failed)):
            if route and route.policy_error:
                self.policy_errors.labels(route.policy_error).inc()
        for attempt in record.failed:
            self.replays.labels(attempt.code).inc()
            self._count_transfer(attempt.transfer_backend, attempt.code)
        if record.prompt_trace and record.prompt_trace.fetch:
            self._count_fetch(record.prompt_trace.fetch)
        for migration in record.migrations:
            self._count_migration(migration)
        if record.decode_trace and record.status:
            trace = record.decode_trace
            self._count_transfer(trace.transfer_backend, record.status)
            if trace.transfer_backend:
                self.transferred_bytes.labels(trace.transfer_backend).inc(trace.transfer_bytes)
            self._count_pulls(trace)

    def _count_fetch(self, fetch: PrefixFetch) -> None:
        self.prefix_fetches.labels(fetch.error or "ok").inc()
        if not fetch.error:
            self.prefix_fetched_tokens.inc(fetch.tokens)
            self.prefix_fetch.observe(fetch.seconds)

    def _count_migration(self, migration: Migration) -> None:
        self.migrations.labels(migration.outcome or Cancelled.code, migration.reason.value).inc()
        if migration.pause is not None:
            self.migration_pause.observe(migration.pause)
        if (trace := migration.trace) and trace.transfer_backend:
            self._count_transfer(trace.transfer_backend, migration.outcome or "")
            self.transferred_bytes.labels(trace.transfer_backend).inc(trace.transfer_bytes)

    def _count_pulls(self, trace: EngineTrace) -> None:
        if trace.transfer_mode and trace.transfer_pulls:
            self.transfer_modes.labels(trace.transfer_mode).inc()
        for stage, seconds in trace.transfer_stages:
            if stage in self.transfer_stages:
                self.transfer_stages[stage].observe(seconds)
        for backend, cause in trace.transfer_failovers:
            self.transfer_failovers.labels(backend, cause).inc()

    def _count_transfer(self, backend: str, result: str) -> None:
        """A request that failed after its handoff does not speak against the transfer."""
        if backend:
            self.transfers.labels(backend, result if result in _TRANSFER_ERRORS else "ok").inc()

    def watch_engines(self, engines: Callable[[], Iterable[EngineView]]) -> None:
        """Export the engines' load; read anew at every scrape."""
        self.registry.register(_EngineCollector(engines))

    def name_as_vllm(self, model: str, engines: Callable[[], Iterable[EngineView]]) -> None:
        """Export what vLLM has names for under those as well."""
        histograms = (self.time_to_first_token, self.inter_token_latency, self.request_latency)
        stages = (self.stages[stage] for stage in ("queue", "prefill", "decode"))
        families = (self.prompt_tokens, self.output_tokens, *histograms, *stages)
        sources = {family.name: source for source in families for family in source.collect()}
        self.registry.register(VllmNames(model, sources, engines))

    def watch_index(self, sizes: Callable[[], IndexSizes]) -> None:
        """Export what the router's KV index knows; read anew at every scrape."""
        self.registry.register(IndexCollector(sizes))

    def watch_waiting(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """Export how many requests wait to be let in, by tenant; read anew at every scrape."""
        self.registry.register(WaitingCollector(waiting))

    def watch_scaler(self, figures: Callable[[], ScalerFigures | None]) -> None:
        """Export what the scaler has told last; read anew at every scrape."""
        self.registry.register(ScalerCollector(figures))

    def exposition(self, others: Mapping[Series, float] = MappingProxyType({})) -> bytes:
        """The Prometheus text format; its media type is CONTENT_TYPE. others: what other processes have counted."""
        totals = CollectorRegistry()
        totals.register(Totals(self.registry, others))
        return generate_latest(totals)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        self.described.append(Description(name, "histogram", (), documentation))
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counter:
        self.described.append(Description(name, "counter", labels, documentation))
        return Counter(name, documentation, labels, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, engines: Callable[[], Iterable[EngineView]]) -> None:
        self._engines = engines

    def describe(self) -> Iterable[Metric]:
        return (*_engine_gauges(), *tier_families(()))

    def collect(self) -> Iterator[Metric]:
        up, running, waiting, backlog, blocks, links, numerics = _engine_gauges()
        views = tuple(self._engines())
        numerics.add_metric([], len({view.numerics for view in views if view.numerics}))
        for view in views:
            endpoint, load = view.endpoint, view.load
            engine = endpoint.engine_id
            up.add_metric([engine, endpoint.role.value, endpoint.state.value], 1)
            if endpoint.role is Role.DECODE:
                links.add_metric([engine], len(view.lost_links))
            if load is None:
                continue
            running.add_metric([engine], load.running)
            waiting.add_metric([engine], load.waiting)
            backlog.add_metric([engine], load.backlog_tokens)
            for state, count in asdict(load.blocks).items():
                if state != "total":
                    blocks.add_metric([engine, state], count)
        yield from (up, running, waiting, backlog, blocks, links, numerics)
        yield from tier_families(views)


_ENGINE_LABELS: tuple[tuple[str, ...], ...] = (
    ("engine", "role", "state"),
    ("engine",),
    ("engine",),
    ("engine",),
    ("engine", "state"),
    ("engine",),
    (),
)


def _engine_gauges() -> tuple[GaugeMetricFamily, ...]:
    names = (
        ("pdserve_engine_info", "1 for each engine."),
        ("pdserve_engine_running_sequences", "Sequences in the batch."),
        ("pdserve_engine_waiting_sequences", "Sequences that wait for room or KV."),
        ("pdserve_engine_backlog_tokens", "Prompt tokens still to compute."),
        ("pdserve_kv_blocks", "KV blocks by state; the states sum up to all blocks."),
        ("pdserve_lost_links", "Prefill engines a decode engine is not sent to now, because their link was lost."),
        (
            "pdserve_numerics",
            "Ways in which engines in deterministic mode round; where there are several, equal requests may get "
            "different answers.",
        ),
    )
    return tuple(
        GaugeMetricFamily(name, documentation, labels=labels)
        for (name, documentation), labels in zip(names, _ENGINE_LABELS, strict=True)
    )
