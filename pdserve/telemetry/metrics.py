"""Every metric pdserve exports, by name, in one place. Units are in the names, in seconds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pdserve.core.cluster import EngineView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 600)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The instruments of one process, on a registry of their own.

    A request that began is counted once in requests, when it ends, by endpoint and status ("ok" or the code
    of its error). One answered with an error instead of any output, begun or not, is counted in rejections.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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

    def watch_engines(self, engines: Callable[[], Iterable[EngineView]]) -> None:
        """Export the engines' load; read anew at every scrape."""
        self.registry.register(_EngineCollector(engines))

    def exposition(self) -> bytes:
        """The Prometheus text format; its media type is CONTENT_TYPE."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)


class _EngineCollector(Collector):
    def __init__(self, engines: Callable[[], Iterable[EngineView]]) -> None:
        self._engines = engines

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return _engine_gauges()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up, running, waiting, backlog, blocks = _engine_gauges()
        for view in self._engines():
            endpoint, load = view.endpoint, view.load
            engine = endpoint.engine_id
            up.add_metric([engine, endpoint.role.value, endpoint.state.value], 1)
            if load is None:
                continue
            running.add_metric([engine], load.running)
            waiting.add_metric([engine], load.waiting)
            backlog.add_metric([engine], load.backlog_tokens)
            for state, count in asdict(load.blocks).items():
                if state != "total":
                    blocks.add_metric([engine, state], count)
        yield from (up, running, waiting, backlog, blocks)


def _engine_gauges() -> tuple[GaugeMetricFamily, ...]:
    return (
        GaugeMetricFamily("pdserve_engine_info", "1 for each engine.", labels=["engine", "role", "state"]),
        GaugeMetricFamily("pdserve_engine_running_sequences", "Sequences in the batch.", labels=["engine"]),
        GaugeMetricFamily("pdserve_engine_waiting_sequences", "Sequences that wait for room or KV.", labels=["engine"]),
        GaugeMetricFamily("pdserve_engine_backlog_tokens", "Prompt tokens still to compute.", labels=["engine"]),
        GaugeMetricFamily(
            "pdserve_kv_blocks", "KV blocks by state; the states sum up to all blocks.", labels=["engine", "state"]
        ),
    )
