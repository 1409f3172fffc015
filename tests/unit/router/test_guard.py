"""A custom policy that fails costs no request: kv_aware stands in, and says why."""

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from pdserve.core.cluster import ClusterState, Route, RouteAsk
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.router.guard import GuardedPolicy
from pdserve.router.policies import KVAware
from pdserve.router.policy import RoutingPolicy
from pdserve.router.rules import RoutingRules
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord
from tests.unit.router.views import ask, cluster, view

RULES = RoutingRules()
STATE = cluster(
    view("p0", Role.PREFILL), view("p1", Role.PREFILL, state=EngineState.SUSPECT), view("d0", Role.DECODE, epoch=7)
)


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        raise self.error


class Answers:
    def __init__(self, route: object) -> None:
        self.route = route

    def choose(self, ask: RouteAsk, state: ClusterState) -> Route:
        return self.route  # type: ignore[return-value]  # what the guard has to find out


def good() -> Route:
    return KVAware(RULES).choose(ask(), STATE)


def guarded(policy: RoutingPolicy) -> GuardedPolicy:
    return GuardedPolicy("mine:Policy", policy, KVAware(RULES))


def test_a_route_that_may_be_taken_passes_as_it_is() -> None:
    route = good()
    assert guarded(Answers(route)).choose(ask(), STATE) is route


def bad_routes() -> dict[str, tuple[object, str]]:
    route = good()
    suspect, stranger = STATE.engines[1].endpoint, replace(route.decode, epoch=8)
    return {
        "nothing": (None, "TypeError"),
        "a suspect engine": (replace(route, prefill=suspect), "ValueError"),
        "another incarnation": (replace(route, decode=stranger), "ValueError"),
    }


@pytest.mark.parametrize("name", bad_routes())
def test_kv_aware_stands_in_for_a_route_that_may_not_be_taken(name: str) -> None:
    answer, error = bad_routes()[name]
    route = guarded(Answers(answer)).choose(ask(), STATE)
    assert (route.prefill, route.decode, route.policy_error) == (good().prefill, good().decode, error)
    assert route.reason.startswith(f"mine:Policy failed ({error}): ")


def test_an_excluded_engine_may_not_be_taken() -> None:
    state = cluster(*STATE.engines, view("d1", Role.DECODE))
    route = guarded(Answers(good())).choose(ask(excluded=("d1",)), state)
    assert route.policy_error == ""
    route = guarded(Answers(replace(good(), decode=state.engines[3].endpoint))).choose(ask(excluded=("d1",)), state)
    assert (route.decode.engine_id, route.policy_error) == ("d0", "ValueError")


def test_each_kind_of_failure_is_logged_once_and_counted_every_time() -> None:
    policy = Raises(KeyError("tenant"))
    guard, metrics = guarded(policy), Metrics()
    with capture_logs() as logs:
        for error in (policy.error, policy.error, ZeroDivisionError()):
            policy.error = error
            record = RequestRecord(request_id="r", route=guard.choose(ask(), STATE), status="ok")
            metrics.count(record)
    assert [(line["log_level"], line["error"]) for line in logs] == [
        ("error", "KeyError"),
        ("error", "ZeroDivisionError"),
    ]
    exposed = metrics.exposition().decode()
    assert 'pdserve_policy_errors_total{error="KeyError"} 2.0' in exposed
    assert 'pdserve_policy_errors_total{error="ZeroDivisionError"} 1.0' in exposed


def test_that_no_engine_may_serve_a_request_is_an_answer_not_a_failure() -> None:
    with pytest.raises(Unavailable, match="try later"):
        guarded(Raises(Unavailable("try later"))).choose(ask(), STATE)
