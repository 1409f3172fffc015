"""Counts what befalls engines, from the endpoint sets the registry sends and from what engines tell."""

from collections.abc import Iterable

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import Endpoint, EngineState
from pdserve.telemetry.metrics import Metrics


class EngineWatch:
    """Told every endpoint set in turn, and the engines whenever one begins to drain."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._known: dict[str, Endpoint] = {}
        self._overrun: dict[str, int] = {}
        """Epoch of each engine's latest incarnation that gave up its memory."""

    def update(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Count new incarnations of known engines, and engines that have just fallen silent."""
        for endpoint in endpoints:
            before = self._known.get(endpoint.engine_id)
            if before is not None and before.epoch != endpoint.epoch:
                self._metrics.engine_restarts.labels(endpoint.engine_id).inc()
            elif before is not None and endpoint.state is EngineState.SUSPECT is not before.state:
                self._metrics.late_heartbeats.labels(endpoint.engine_id).inc()
            self._known[endpoint.engine_id] = endpoint

    def draining(self, views: Iterable[EngineView]) -> None:
        """Count incarnations that drain because of their quarantine."""
        for view in views:
            engine_id, epoch = view.endpoint.engine_id, view.endpoint.epoch
            if view.load and view.load.drain_cause == "quarantine" and self._overrun.get(engine_id) != epoch:
                self._overrun[engine_id] = epoch
                self._metrics.quarantine_drains.labels(engine_id).inc()
