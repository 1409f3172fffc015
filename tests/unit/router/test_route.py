"""choose_route picks one pair and one mode, purely from the cluster state it is shown."""

import pytest

from pdserve.core.cluster import ClusterState, EngineView, Mode
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineState, LoadSnapshot, Role
from pdserve.core.errors import Unavailable
from pdserve.router.route import RoutingRules, choose_route

RULES = RoutingRules(decode_local_below=32)


def view(
    engine_id: str,
    role: Role,
    *,
    state: EngineState = EngineState.READY,
    backlog: int = 0,
    running: int = 0,
    booked: tuple[int, int] = (0, 0),
    draining: bool = False,
) -> EngineView:
    endpoint = Endpoint(engine_id=engine_id, role=role, epoch=1, address="127.0.0.1:1", pid=1, state=state)
    load = LoadSnapshot(
        engine_id=engine_id,
        epoch=1,
        number=1,
        running=running,
        waiting=0,
        backlog_tokens=backlog,
        blocks=BlockCounts(total=8, free=8, used=0, leased=0, quarantined=0),
        draining=draining,
    )
    return EngineView(endpoint=endpoint, load=load, booked_requests=booked[0], booked_tokens=booked[1])


def cluster(*views: EngineView) -> ClusterState:
    return ClusterState(now=0.0, engines=views)


def test_a_long_prompt_goes_to_the_least_loaded_pair() -> None:
    state = cluster(
        view("p0", Role.PREFILL, backlog=500),
        view("p1", Role.PREFILL, backlog=20),
        view("d0", Role.DECODE, running=9),
        view("d1", Role.DECODE, running=2),
    )
    route = choose_route(state, 100, RULES)
    assert (route.mode, route.prefill.engine_id, route.decode.engine_id) == (Mode.DISAGGREGATED, "p1", "d1")
    assert [(c.prefill, c.decode) for c in route.alternatives] == [("p1", "d0"), ("p0", "d1"), ("p0", "d0")]
    assert [c.cost for c in route.alternatives] == sorted(c.cost for c in route.alternatives)


def test_work_booked_since_the_last_snapshot_counts() -> None:
    state = cluster(
        view("p0", Role.PREFILL, booked=(1, 900)),
        view("p1", Role.PREFILL, backlog=100),
        view("d0", Role.DECODE, booked=(5, 0)),
        view("d1", Role.DECODE, running=3),
    )
    route = choose_route(state, 100, RULES)
    assert (route.prefill.engine_id, route.decode.engine_id) == ("p1", "d1")


@pytest.mark.parametrize(("tokens", "mode"), [(31, Mode.DECODE_LOCAL), (32, Mode.DISAGGREGATED)])
def test_a_short_prompt_stays_on_the_decode_engine(tokens: int, mode: Mode) -> None:
    route = choose_route(cluster(view("p0", Role.PREFILL), view("d0", Role.DECODE)), tokens, RULES)
    assert route.mode is mode
    assert route.prefill.engine_id == ("d0" if mode is Mode.DECODE_LOCAL else "p0")


@pytest.mark.parametrize("lost", [Role.PREFILL, Role.DECODE])
def test_an_empty_pool_is_named(lost: Role) -> None:
    kept = [v for v in (view("p0", Role.PREFILL), view("d0", Role.DECODE)) if v.endpoint.role is not lost]
    with pytest.raises(Unavailable, match=f"no {lost.value} engine"):
        choose_route(cluster(*kept), 100, RULES)


@pytest.mark.parametrize("state", [EngineState.SUSPECT, EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD])
def test_only_ready_engines_get_work(state: EngineState) -> None:
    views = (view("p0", Role.PREFILL, state=state), view("p1", Role.PREFILL, backlog=999), view("d0", Role.DECODE))
    assert choose_route(cluster(*views), 100, RULES).prefill.engine_id == "p1"


def test_an_engine_that_says_it_drains_gets_no_work() -> None:
    views = (view("p0", Role.PREFILL, draining=True), view("p1", Role.PREFILL, backlog=999), view("d0", Role.DECODE))
    assert choose_route(cluster(*views), 100, RULES).prefill.engine_id == "p1"


def test_unified_engines_alone_serve_everything() -> None:
    route = choose_route(cluster(view("u0", Role.UNIFIED, backlog=50), view("u1", Role.UNIFIED)), 500, RULES)
    assert (route.mode, route.decode.engine_id) == (Mode.DECODE_LOCAL, "u1")
