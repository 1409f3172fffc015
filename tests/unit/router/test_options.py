"""Which engines may serve a request, in which mode, and what is said when none may."""

import pytest

from pdserve.core.cluster import EngineView, Mode
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.router.options import find_options
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import ask, cluster, view

RULES = RoutingRules(decode_local_below=32)
STRICT = RoutingRules(decode_local_below=32, fallback=False)


def ids(views: tuple[EngineView, ...]) -> list[str]:
    return [v.endpoint.engine_id for v in views]


@pytest.mark.parametrize(("cached", "short"), [(468, False), (469, True), (500, True)])
def test_a_prompt_is_short_by_what_the_decode_engine_itself_lacks(cached: int, short: bool) -> None:
    state = cluster(view("p0", Role.PREFILL), view("d0", Role.DECODE), view("d1", Role.DECODE))
    options = find_options(ask(500, d1=cached), state, RULES)
    assert [option.view.endpoint.engine_id for option in options.local] == (["d1"] if short else [])
    assert options.pairs


@pytest.mark.parametrize(("lost", "mode"), [(Role.PREFILL, Mode.DECODE_LOCAL), (Role.DECODE, Mode.PREFILL_LOCAL)])
def test_one_pool_serves_alone_while_the_other_has_no_engine(lost: Role, mode: Mode) -> None:
    kept = [v for v in (view("p0", Role.PREFILL), view("d0", Role.DECODE)) if v.endpoint.role is not lost]
    options = find_options(ask(500), cluster(*kept), RULES)
    assert not options.pairs
    assert [(option.mode, option.reason) for option in options.local] == [(mode, f"no {lost.value} engine is ready")]


@pytest.mark.parametrize("lost", [Role.PREFILL, Role.DECODE])
def test_without_fallback_the_empty_pool_is_named(lost: Role) -> None:
    kept = [v for v in (view("p0", Role.PREFILL), view("d0", Role.DECODE)) if v.endpoint.role is not lost]
    with pytest.raises(Unavailable, match=f"no {lost.value} engine"):
        find_options(ask(500), cluster(*kept), STRICT)


def test_prefill_engines_decode_only_when_every_decode_engine_is_full() -> None:
    full = view("d0", Role.DECODE, used=1000)
    roomy = view("d1", Role.DECODE)
    p0 = view("p0", Role.PREFILL)
    assert find_options(ask(500), cluster(p0, full, roomy), RULES).local == ()
    (option,) = find_options(ask(500), cluster(p0, full), RULES).local
    assert (option.mode, option.reason) == (Mode.PREFILL_LOCAL, "every decode engine is full")
    assert find_options(ask(500), cluster(p0, full), STRICT).local == ()


@pytest.mark.parametrize("state", [EngineState.SUSPECT, EngineState.STARTING, EngineState.DRAINING, EngineState.DEAD])
def test_only_ready_engines_get_work(state: EngineState) -> None:
    views = view("p0", Role.PREFILL, state=state), view("p1", Role.PREFILL), view("d0", Role.DECODE)
    assert ids(find_options(ask(), cluster(*views), RULES).prefills) == ["p1"]


def test_a_draining_or_excluded_engine_gets_no_work() -> None:
    views = (
        view("p0", Role.PREFILL, draining=True),
        view("p1", Role.PREFILL),
        view("d0", Role.DECODE),
        view("d1", Role.DECODE),
    )
    options = find_options(ask(excluded=("d0",)), cluster(*views), RULES)
    assert (ids(options.prefills), ids(options.decodes)) == (["p1"], ["d1"])


def test_an_excluded_engine_that_came_back_gets_work() -> None:
    views = view("p0", Role.PREFILL), view("d0", Role.DECODE, epoch=2)
    assert ids(find_options(ask(excluded=("d0",)), cluster(*views), RULES).decodes) == ["d0"]


def test_a_prefill_engine_full_of_leases_gets_prompts_only_if_all_are() -> None:
    full, free = view("p0", Role.PREFILL, leased=900), view("p1", Role.PREFILL, leased=100)
    d0 = view("d0", Role.DECODE)
    assert ids(find_options(ask(), cluster(full, free, d0), RULES).prefills) == ["p1"]
    assert ids(find_options(ask(), cluster(full, d0), RULES).prefills) == ["p0"]


def test_unified_engines_serve_alone() -> None:
    options = find_options(ask(), cluster(view("u0", Role.UNIFIED)), STRICT)
    assert [option.mode for option in options.local] == [Mode.DECODE_LOCAL]
