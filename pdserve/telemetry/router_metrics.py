"""Metrics of one of several routers: whether it sees the others, and what becomes of requests with idempotency keys."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

SHARED_STATE_UP = (
    "pdserve_redis_up",
    "1 while Redis answers this router, 0 while it does not and each router is on its own; absent without Redis.",
)


class RouterMetrics:
    """Of one process."""

    def __init__(self, registry: CollectorRegistry, counter: Callable[[str, str, tuple[str, ...]], Counter]) -> None:
        self._registry = registry
        self.keyed_requests = counter(
            "pdserve_idempotent_requests_total",
            'Requests with an idempotency key: "executed", "attached" to one that ran here, or "replayed" from one '
            "that had ended.",
            ("outcome",),
        )

    def watch_redis(self, is_up: Callable[[], bool]) -> None:
        """Export whether Redis answers; read anew at every scrape."""
        Gauge(*SHARED_STATE_UP, registry=self._registry).set_function(lambda: float(is_up()))
