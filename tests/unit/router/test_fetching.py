"""Where a prompt's beginning comes from: the choice between cache, fetch and computing."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pdserve.core.cluster import FETCH_SECONDS, EngineView, Mode, PrefixHit, Route, RouteAsk, StepModel
from pdserve.core.endpoint import EngineState, Role
from pdserve.router.cost import CostModel
from pdserve.router.fetching import best_fetch, find_sources
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import BLOCK_SIZE, ask, cluster, hits, view

RULES = RoutingRules(decode_local_below=0)
P0, D0 = view("p0", Role.PREFILL), view("d0", Role.DECODE)


def choose(request: RouteAsk, *views: EngineView, rules: RoutingRules = RULES) -> Route:
    return KVAware(rules).choose(request, cluster(*views))


def test_the_history_is_fetched_from_the_decode_engine_that_wrote_it() -> None:
    route = choose(ask(500, d0=480), P0, D0)
    assert route.mode is Mode.DISAGGREGATED
    assert route.fetch
    assert (route.fetch.source.engine_id, route.fetch.source.num_blocks) == ("d0", 30)
    assert (route.uncached_tokens, route.fetch.tokens) == (20, 480)
    assert route.fetch.seconds < route.fetch.saved_seconds
    assert "30 blocks to fetch from d0" in route.reason
    assert route.fetch_link == (("d0", 1), ("p0", 1))
    assert route.prediction
    assert route.prediction.ttft < 0.05


def test_the_last_token_is_always_computed() -> None:
    route = choose(ask(480, d0=480), P0, D0)
    assert route.fetch
    assert route.fetch.source.num_blocks == 29


@pytest.mark.parametrize(("here", "blocks"), [(0, 16), (160, 26), (256, 30)])
def test_no_more_is_planned_than_a_lender_lends_at_a_time_behind_what_is_here(here: int, blocks: int) -> None:
    small = view("d0", Role.DECODE, num_blocks=64)
    plan = best_fetch(ask(500, d0=480, p0=here), P0, [small], RULES)
    assert plan
    assert (plan.source.num_blocks, plan.tokens) == (blocks, blocks * BLOCK_SIZE)


@pytest.mark.parametrize(
    ("request_", "views", "rules"),
    [
        (ask(500, d0=480, p0=480), (P0, D0), RULES),
        (ask(500, d0=16), (P0, D0), RULES),
        (ask(500, d0=480), (P0, D0), replace(RULES, fetch=False)),
        (ask(500, d0=480), (view("p0", Role.PREFILL, lost_links=("d0",)), D0), RULES),
        (ask(500, d1=480), (P0, D0, view("d1", Role.DECODE, state=EngineState.SUSPECT)), RULES),
        (ask(500, d1=480), (P0, D0, view("d1", Role.DECODE, draining=True)), RULES),
        (ask(500, d1=480, excluded=("d1",)), (P0, D0, view("d1", Role.DECODE)), RULES),
        (ask(500, d0=480), (replace(P0, fetch_speeds={("d0", 1): 1e-3}), D0), RULES),
        (
            replace(ask(500), hits={("d0", 1): PrefixHit(tokens=0, likely_tokens=480)}),
            (P0, D0),
            RULES,
        ),
    ],
    ids=["here", "too little", "off", "link lost", "suspect", "draining", "excluded", "slow", "only expected"],
)
def test_nothing_is_fetched(request_: RouteAsk, views: tuple[EngineView, ...], rules: RoutingRules) -> None:
    route = choose(request_, *views, rules=rules)
    assert route.fetch is None
    assert route.uncached_tokens == request_.uncached(("p0", 1))


def test_an_idle_engine_that_fetches_is_preferred_to_a_busy_one_that_holds() -> None:
    def chosen(backlog: int) -> tuple[str, bool]:
        route = choose(ask(500, p1=480), P0, view("p1", Role.PREFILL, backlog=backlog), D0)
        return route.prefill.engine_id, route.fetch is not None

    assert chosen(0) == ("p1", False)
    assert chosen(500) == ("p0", True)


def test_of_several_sources_the_one_that_makes_it_soonest_is_asked() -> None:
    slow = replace(P0, fetch_speeds={("d1", 1): 5e-5})
    far = view("d1", Role.DECODE)
    route = choose(ask(500, d0=400, d1=480), slow, D0, far)
    assert route.fetch
    assert route.fetch.source.engine_id == "d0"
    route = choose(ask(500, d0=400, d1=480), P0, D0, far)
    assert route.fetch
    assert route.fetch.source.engine_id == "d1"


def test_of_hundreds_that_share_a_beginning_only_the_few_that_hold_most_come_into_question() -> None:
    views = [view(f"d{i:03}", Role.DECODE) for i in range(300)]
    held = {v.endpoint.engine_id: BLOCK_SIZE * (i % 30) for i, v in enumerate(views)}
    request = replace(ask(500), hits=hits(held))
    sources = find_sources(request, cluster(*views), RULES)
    assert [(v.endpoint.engine_id, request.hits[v.key].tokens) for v in sources] == [
        (f"d{i:03}", 464) for i in (29, 59, 89)
    ]


def below(tokens: int, seconds: float, *, held: int = 480) -> RouteAsk:
    """d0 holds the beginning of the prompt, the last of it in a tier that takes so long for it."""
    hit = PrefixHit(tokens=held, likely_tokens=held, restored_tokens=tokens, restore_seconds=seconds)
    return replace(ask(500), hits={D0.key: hit})


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        (below(160, 0.001), 480),
        (below(160, 0.0), 480),
        (below(160, 1.0), 320),
        (below(480, 0.001), 480),
        (below(480, 1.0), None),
    ],
    ids=["fast", "not measured yet", "slow", "all of it", "all of it, slow"],
)
def test_what_its_source_must_restore_first_is_fetched_where_that_takes_less(
    request_: RouteAsk, tokens: int | None
) -> None:
    route = choose(request_, P0, D0)
    assert (route.fetch.tokens if route.fetch else None) == tokens


def test_a_restore_at_the_source_counts_for_what_is_fetched_of_it() -> None:
    request = below(160, 0.002)
    with_own = replace(request, hits={**request.hits, P0.key: PrefixHit(tokens=400, likely_tokens=400)})
    times = [
        plan.seconds - FETCH_SECONDS - (480 - own) * RULES.fetch_seconds_per_token
        for own, each in ((0, request), (400, with_own))
        if (plan := best_fetch(each, P0, [D0], RULES))
    ]
    assert times == pytest.approx([0.002, 0.001])


def test_no_more_is_restored_at_a_source_than_it_has_spare_blocks_for() -> None:
    small = view("d0", Role.DECODE, num_blocks=80)
    plan = best_fetch(below(480, 0.0), P0, [small], RULES)
    assert plan
    assert plan.source.num_blocks == 10


def test_an_engine_that_does_both_may_fetch_too() -> None:
    route = choose(ask(500, u1=480), view("u0", Role.UNIFIED), view("u1", Role.UNIFIED, backlog=2000))
    assert (route.prefill.engine_id, route.decode.engine_id) == ("u0", "u0")
    assert route.fetch
    assert route.fetch.source.engine_id == "u1"


Speeds = st.floats(1e-8, 1e-3)
Models = st.builds(StepModel, base=st.floats(1e-4, 1e-1), per_token=st.floats(0, 1e-2), per_context=st.floats(0, 1e-6))


@given(
    prompt=st.integers(1, 10_000),
    here=st.integers(0, 10_000),
    there=st.integers(0, 10_000),
    model=Models,
    speed=Speeds,
    margin=st.floats(0, 2),
)
def test_a_plan_is_whole_blocks_beyond_the_own_cache_and_knows_from_how_many_on_it_pays(
    prompt: int, here: int, there: int, model: StepModel, speed: float, margin: float
) -> None:
    here, there = here // BLOCK_SIZE * BLOCK_SIZE, there // BLOCK_SIZE * BLOCK_SIZE
    request, rules = ask(prompt, p0=here, d0=there), replace(RULES, fetch_margin=margin)
    target = replace(P0, step_model=model, fetch_speeds={D0.key: speed})
    plan = best_fetch(request, target, find_sources(request, cluster(target, D0), rules), rules)
    if plan is None:
        assert min(there, (prompt - 1) // BLOCK_SIZE * BLOCK_SIZE) <= min(here, prompt - 1)
        return
    assert plan.tokens == plan.source.num_blocks * BLOCK_SIZE <= min(there, prompt - 1)
    extra = plan.tokens - min(here, prompt - 1)
    assert extra > 0
    assert plan.seconds == pytest.approx(FETCH_SECONDS + extra * speed)
    assert plan.saved_seconds >= 0
    assert 1 <= plan.source.least_blocks <= plan.source.num_blocks
    if plan.saved_seconds > plan.seconds * (1 + margin) * (1 + 1e-6):
        assert (plan.source.least_blocks - 1) * BLOCK_SIZE <= extra


@given(
    prompt=st.integers(1, 10_000),
    there=st.integers(0, 10_000),
    model=Models,
    speed=Speeds,
    backlog=st.integers(0, 5000),
)
def test_a_source_never_makes_a_candidate_dearer_and_is_asked_only_where_that_saves(
    prompt: int, there: int, model: StepModel, speed: float, backlog: int
) -> None:
    request = ask(prompt, d0=there // BLOCK_SIZE * BLOCK_SIZE)
    target = replace(view("p0", Role.PREFILL, backlog=backlog), step_model=model, fetch_speeds={D0.key: speed})
    state = cluster(target, D0)
    without = CostModel(request, 0.0, RULES).pair(target, D0)
    joint = CostModel(request, 0.0, RULES, find_sources(request, state, RULES)).pair(target, D0)
    assert joint.cost <= without.cost
    if joint.fetch:
        assert joint.cost < without.cost
        assert joint.fetch.seconds < joint.fetch.saved_seconds * 2.1
    else:
        assert joint == without


@given(prompt=st.integers(100, 10_000), there=st.integers(16, 5000), more=st.integers(0, 5000), model=Models)
def test_a_source_that_holds_more_never_makes_it_dearer_where_fetching_beats_computing(
    prompt: int, there: int, more: int, model: StepModel
) -> None:
    assume(model.per_token > 1e-5)
    target = replace(P0, step_model=model, fetch_speeds={D0.key: 1e-6})

    def cost(tokens: int) -> float:
        request = ask(prompt, d0=tokens // BLOCK_SIZE * BLOCK_SIZE)
        sources = find_sources(request, cluster(target, D0), RULES)
        return CostModel(request, 0.0, RULES, sources).local(target).cost

    assert cost(there + more) <= cost(there) * (1 + 1e-9)
