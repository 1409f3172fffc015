"""Counts what befalls engines, from the endpoint sets the registry sends."""

from pdserve.core.endpoint import Endpoint, EngineState
from pdserve.telemetry.metrics import Metrics


class EngineWatch:
    """Told every endpoint set in turn."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._known: dict[str, Endpoint] = {}

    def update(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Count new incarnations of known engines, and engines that have just fallen silent."""
        for endpoint in endpoints:
            before = self._known.get(endpoint.engine_id)
            if before is not None and before.epoch != endpoint.epoch:
                self._metrics.engine_restarts.labels(endpoint.engine_id).inc()
            elif before is not None and endpoint.state is EngineState.SUSPECT is not before.state:
                self._metrics.late_heartbeats.labels(endpoint.engine_id).inc()
            self._known[endpoint.engine_id] = endpoint
