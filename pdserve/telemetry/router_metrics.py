"""Metrics of one of several routers: whether it sees the others, and what becomes of requests with idempotency keys."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

REDIS_UP = (
    "pdserve_redis_up",
    "1 while Redis answers this router, 0 while it does not and each router is on its own; absent without Redis.",
)
OTHER_ROUTERS = ("pdserve_other_routers", "Routers whose bookings this one hears of through Redis.")


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

    def watch(self, is_up: Callable[[], bool], others: Callable[[], int]) -> None:
        """Export whether Redis answers, and how many other routers are heard from; read anew at every scrape."""
        Gauge(*REDIS_UP, registry=self._registry).set_function(lambda: float(is_up()))
        Gauge(*OTHER_ROUTERS, registry=self._registry).set_function(others)
