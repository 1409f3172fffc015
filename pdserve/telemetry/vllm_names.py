"""The same figures under vLLM's names, for dashboards and scalers that were made for them.

Names as vLLM documents them (docs.vllm.ai, "Production metrics"); one series per engine where it has one per process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.core.cluster import EngineView

COPIED = {
    "pdserve_prompt_tokens": "vllm:prompt_tokens",
    "pdserve_output_tokens": "vllm:generation_tokens",
    "pdserve_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "pdserve_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "pdserve_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "pdserve_queue_seconds": "vllm:request_queue_time_seconds",
    "pdserve_prefill_seconds": "vllm:request_prefill_time_seconds",
    "pdserve_decode_seconds": "vllm:request_decode_time_seconds",
}
"""Families that differ in name and labels only, without a counter's `_total`."""


class VllmNames(Collector):
    """Reads other collectors and the engines anew at every scrape. Every series has the label model_name."""

    def __init__(
        self, model: str, sources: Mapping[str, Collector], engines: Callable[[], Iterable[EngineView]]
    ) -> None:
        """sources by family, as in COPIED."""
        self._model = {"model_name": model}
        self._sources = sources
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        for name, theirs in COPIED.items():
            for family in self._sources[name].collect():
                yield self._renamed(family, theirs)
        yield from self._engine_gauges()

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            renamed.add_sample(name + suffix, {**sample.labels, **self._model}, sample.value)
        return renamed

    def _engine_gauges(self) -> Iterator[Metric]:
        running = self._gauge("vllm:num_requests_running", "Sequences in the batch.")
        waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait for room or KV.")
        usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that are not free, 0 to 1.")
        sizes = self._gauge("vllm:cache_config_info", "Sizes of the KV cache.", "block_size", "num_gpu_blocks")
        for view in self._engines():
            labels = [view.endpoint.engine_id, *self._model.values()]
            if load := view.load:
                running.add_metric(labels, load.running)
                waiting.add_metric(labels, load.waiting)
                usage.add_metric(labels, 1 - load.blocks.free / load.blocks.total if load.blocks.total else 0.0)
            if capacity := view.capacity:
                sizes.add_metric([*labels, str(capacity.block_size), str(capacity.num_blocks)], 1)
        yield from (running, waiting, usage, sizes)

    def _gauge(self, name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, documentation, labels=["engine", *self._model, *labels])
