"""Which engines may serve a request, in which mode, and what is said when none may."""

from dataclasses import replace

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


@pytest.mark.parametrize(("below", "local"), [(0, False), (16, False), (200, False), (201, True)])
def test_while_prefill_is_short_longer_prompts_count_as_short(below: int, local: bool) -> None:
    state = replace(cluster(view("p0", Role.PREFILL), view("d0", Role.DECODE)), bypass_below=below)
    assert bool(find_options(ask(500, d0=300), state, RULES).local) is local


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


def test_a_lost_link_parts_its_pair_only() -> None:
    p0, p1 = view("p0", Role.PREFILL), view("p1", Role.PREFILL)
    d0, d1 = view("d0", Role.DECODE, lost_links=("p0",)), view("d1", Role.DECODE)
    options = find_options(ask(), cluster(p0, p1, d0, d1), RULES)
    assert options.joined(options.prefills, options.decodes) == [(p0, d1), (p1, d0), (p1, d1)]
    assert options.joined([p0], [d0]) == [(p0, d1), (p1, d0), (p1, d1)], "another pair when these have none"
    assert options.local == ()


def test_engines_without_a_link_take_no_part_in_handoffs() -> None:
    cut_off = view("d0", Role.DECODE, lost_links=("p0", "p1"))
    engines = view("p0", Role.PREFILL), view("p1", Role.PREFILL), cut_off, view("d1", Role.DECODE)
    options = find_options(ask(), cluster(*engines), RULES)
    assert (ids(options.prefills), ids(options.decodes)) == (["p0", "p1"], ["d1"])


def test_while_no_link_works_each_engine_may_serve_alone() -> None:
    engines = view("p0", Role.PREFILL), view("d0", Role.DECODE, lost_links=("p0",))
    options = find_options(ask(), cluster(*engines), RULES)
    assert not options.pairs
    assert [(o.view.endpoint.engine_id, o.mode, o.reason) for o in options.local] == [
        ("d0", Mode.DECODE_LOCAL, "no link for a handoff works"),
        ("p0", Mode.PREFILL_LOCAL, "no link for a handoff works"),
    ]
    with pytest.raises(Unavailable, match="no decode engine can fetch from a prefill engine"):
        find_options(ask(), cluster(*engines), STRICT)


def test_a_request_is_not_handed_over_by_engines_it_was_parted_from_unless_nothing_else_is_allowed() -> None:
    two = view("p0", Role.PREFILL), view("p1", Role.PREFILL), view("d0", Role.DECODE), view("d1", Role.DECODE)
    options = find_options(ask(parted=("p0", "d0")), cluster(*two), RULES)
    assert (ids(options.prefills), ids(options.decodes)) == (["p1"], ["d1"])
    one = view("p0", Role.PREFILL), view("d0", Role.DECODE)
    assert not find_options(ask(parted=("p0", "d0")), cluster(*one), RULES).pairs
    assert find_options(ask(parted=("p0", "d0")), cluster(*one), STRICT).pairs


def test_a_prefill_engine_full_of_leases_gets_prompts_only_if_all_are() -> None:
    full, free = view("p0", Role.PREFILL, leased=900), view("p1", Role.PREFILL, leased=100)
    d0 = view("d0", Role.DECODE)
    assert ids(find_options(ask(), cluster(full, free, d0), RULES).prefills) == ["p1"]
    assert ids(find_options(ask(), cluster(full, d0), RULES).prefills) == ["p0"]


def test_unified_engines_serve_alone() -> None:
    options = find_options(ask(), cluster(view("u0", Role.UNIFIED)), STRICT)
    assert [option.mode for option in options.local] == [Mode.DECODE_LOCAL]


@pytest.mark.parametrize(("max_tokens", "able"), [(500, ["d0", "d1"]), (501, ["d1"]), (2000, ["d1"])])
def test_a_request_goes_where_it_may_become_as_long_as_anywhere(max_tokens: int, able: list[str]) -> None:
    """An engine ends a sequence that is as long as it can have any."""
    views = (
        view("p0", Role.PREFILL, max_len=501),
        view("p1", Role.PREFILL, max_len=500),
        view("d0", Role.DECODE, max_len=1000),
        view("d1", Role.DECODE, max_len=2000),
    )
    options = find_options(ask(500, max_tokens=max_tokens), cluster(*views), RULES)
    assert ids(options.prefills) == ["p0"], "a prompt needs room for one token more"
    assert ids(options.decodes) == able


def test_a_prompt_too_long_for_all_is_refused_by_an_engine_not_kept_waiting() -> None:
    views = view("p0", Role.PREFILL, max_len=400), view("d0", Role.DECODE, max_len=400)
    assert find_options(ask(500), cluster(*views), STRICT).pairs


def test_no_engine_that_would_cut_an_answer_short_stands_in_for_one_that_is_back_soon() -> None:
    away = view("d0", Role.DECODE, max_len=2000, state=EngineState.SUSPECT)
    stand_in = view("p0", Role.PREFILL, max_len=1000)
    with pytest.raises(Unavailable):
        find_options(ask(500, max_tokens=501), cluster(stand_in, away), RULES)
    assert find_options(ask(500, max_tokens=500), cluster(stand_in, away), RULES).local


def test_a_continuation_goes_to_engines_that_round_alike_if_there_are_any() -> None:
    engines = [view(name, role, numerics=name[1]) for name, role in (("pa", Role.PREFILL), ("pb", Role.PREFILL))]
    engines += [view(name, Role.DECODE, numerics=name[1]) for name in ("db", "dc")]
    known = {kind: find_options(replace(ask(), numerics=kind), cluster(*engines), RULES) for kind in ("a", "b", "")}
    assert {kind: (ids(options.prefills), ids(options.decodes)) for kind, options in known.items()} == {
        "a": (["pa"], ["db", "dc"]),
        "b": (["pb"], ["db"]),
        "": (["pa", "pb"], ["db", "dc"]),
    }
