"""An operator's policy, with kv_aware in its stead where it fails: its defects cost no request."""

from dataclasses import replace

import structlog

from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.endpoint import EngineState
from pdserve.core.errors import PdserveError
from pdserve.router.policy import RoutingPolicy

log = structlog.get_logger(__name__)


class GuardedPolicy:
    """RoutingPolicy. What the guarded policy raises on purpose passes: it says that no engine may serve the request.

    Every failure is told in the route (reason, policy_error), each kind of failure once in the log."""

    def __init__(self, name: str, policy: RoutingPolicy, stand_in: RoutingPolicy) -> None:
        self._name = name
        self._policy = policy
        self._stand_in = stand_in
        self._logged: set[str] = set()

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        try:
            route = self._policy.choose(ask, state)
            _check(route, ask, state)
        except PdserveError:
            raise
        except Exception as error:  # whatever an operator's code may raise
            kind = type(error).__name__
            if kind not in self._logged:
                self._logged.add(kind)
                log.exception("routing policy failed, kv_aware stands in", policy=self._name, error=kind)
            route = self._stand_in.choose(ask, state)
            return replace(route, policy_error=kind, reason=f"{self._name} failed ({kind}): {route.reason}")
        return route


def _check(route: Route, ask: RouteAsk, state: ClusterState) -> None:
    """Raises ValueError for engines that may not have the request, TypeError for what is no route."""
    if not isinstance(route, Route):
        raise TypeError(f"choose returned {type(route).__name__} where a Route was expected")
    views = {view.key: view for view in state.engines}
    for endpoint in (route.prefill, route.decode):
        view = views.get((endpoint.engine_id, endpoint.epoch))
        if view is None or view.endpoint.state is not EngineState.READY or view.key in ask.excluded:
            raise ValueError(f"{endpoint.engine_id} is not ready or excluded")
