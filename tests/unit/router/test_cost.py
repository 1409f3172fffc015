"""What the joint cost must and must not do, whatever the numbers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.cluster import (
    Booked,
    BookedDecode,
    BookedPrompt,
    EngineView,
    Mode,
    PrefixHit,
    Route,
    RouteAsk,
    StepModel,
)
from pdserve.core.endpoint import Role
from pdserve.router import load
from pdserve.router.cost import CostModel, ranked
from pdserve.router.options import find_options
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import STEP, ask, cluster, view

RULES = RoutingRules(decode_local_below=32)
Seconds = st.floats(0, 1e-2)
Models = st.builds(StepModel, base=st.floats(1e-4, 1e-1), per_token=Seconds, per_context=st.floats(0, 1e-6))
Bookings = st.builds(
    Booked,
    decoding=st.lists(st.builds(BookedDecode, st.integers(0, 256), st.integers(0, 2_000)), max_size=8).map(tuple),
    reserved_tokens=st.integers(0, 20_000),
    prefilling=st.integers(0, 20),
    behind_tokens=st.integers(0, 20_000),
    unseen=st.lists(st.builds(BookedPrompt, st.integers(0, 20_000), st.floats(0, 100)), max_size=4).map(
        lambda prompts: tuple(sorted(prompts, key=lambda prompt: prompt.since))
    ),
)


@st.composite
def engines(draw: st.DrawFn, role: Role, name: str) -> EngineView:
    return view(
        name,
        role,
        backlog=draw(st.integers(0, 20_000)),
        running=draw(st.integers(0, 80)),
        booked=draw(Bookings),
        used=draw(st.integers(0, 1000)),
        recent_work=draw(st.floats(0, 100)),
        step_model=draw(Models),
    )


P0, D0 = engines(Role.PREFILL, "p0"), engines(Role.DECODE, "d0")
Prompts = st.integers(1, 10_000)


def costs(request: RouteAsk, prefill: EngineView, decode: EngineView, now: float = 0.0) -> tuple[float, float, float]:
    """Of the pair, of the decode engine alone, and of the prefill engine alone."""
    model = CostModel(request, now, RULES)
    return model.pair(prefill, decode).cost, model.local(decode).cost, model.local(prefill).cost


def loaded(engine: EngineView, more: int) -> list[EngineView]:
    """The engine with more of each kind of load."""
    assert engine.load
    booked = engine.booked
    return [
        replace(engine, load=replace(engine.load, backlog_tokens=engine.load.backlog_tokens + more)),
        replace(engine, booked=replace(booked, behind_tokens=booked.behind_tokens + more)),
        replace(engine, booked=replace(booked, unseen=(*booked.unseen, BookedPrompt(more, 100.0)))),
        replace(engine, booked=replace(booked, unseen=tuple(BookedPrompt(t + more, at) for t, at in booked.unseen))),
        replace(engine, booked=replace(booked, decoding=(*booked.decoding, BookedDecode(more, more)))),
        replace(engine, booked=replace(booked, decoding=tuple(BookedDecode(e + more, c) for e, c in booked.decoding))),
        replace(engine, booked=replace(booked, decoding=tuple(BookedDecode(e, c + more) for e, c in booked.decoding))),
        replace(engine, booked=replace(booked, prefilling=booked.prefilling + more)),
        replace(engine, booked=replace(booked, reserved_tokens=booked.reserved_tokens + more)),
        replace(engine, others_requests=engine.others_requests + more),
        replace(engine, recent_work=engine.recent_work + more),
        replace(engine, kv_filled=min(1.0, engine.kv_filled + more / 1000)),
    ]


@given(Models, st.integers(1, 100_000), st.integers(0, 100_000), st.booleans())
def test_a_prompt_takes_what_its_work_takes(model: StepModel, prompt: int, cached: int, capacity: bool) -> None:
    size = view("p0", Role.PREFILL).capacity if capacity else None
    work = load.PromptWork.of(size, prompt + cached, cached)
    assert load.prompt_seconds(model, size, prompt + cached, cached) == work.seconds(model)


@given(P0, D0, Prompts, st.integers(1, 5000), st.floats(0, 10))
def test_more_load_never_makes_a_candidate_cheaper(
    prefill: EngineView, decode: EngineView, prompt: int, more: int, now: float
) -> None:
    before = costs(ask(prompt), prefill, decode, now)
    for busier in loaded(prefill, more):
        after = costs(ask(prompt), busier, decode, now)
        assert after[0] >= before[0]
        assert after[2] >= before[2] * (1 - 1e-9)
    for busier in loaded(decode, more):
        after = costs(ask(prompt), prefill, busier, now)
        assert after[0] >= before[0]
        assert after[1] >= before[1]


@given(P0, D0, Prompts, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_a_longer_cached_prefix_never_makes_a_candidate_dearer(
    prefill: EngineView, decode: EngineView, prompt: int, cached: int, on_prefill: int, on_decode: int
) -> None:
    before = costs(ask(prompt, p0=cached, d0=cached), prefill, decode)
    after = costs(ask(prompt, p0=cached + on_prefill, d0=cached + on_decode), prefill, decode)
    assert after[0] <= before[0] * (1 + 1e-9)
    assert after[1] <= before[1] * (1 + 1e-9)


@given(P0, D0, Prompts, st.integers(1, 5000))
def test_more_tokens_to_compute_never_cost_less(
    prefill: EngineView, decode: EngineView, prompt: int, more: int
) -> None:
    before, after = costs(ask(prompt), prefill, decode), costs(ask(prompt + more), prefill, decode)
    assert after[0] >= before[0]
    assert after[1] >= before[1]


@given(
    st.permutations(["p0", "p1", "p2", "d0", "d1", "d2", "u0"]),
    st.lists(engines(Role.PREFILL, "x"), min_size=7, max_size=7),
    st.integers(1, 600),
)
def test_the_order_of_engines_does_not_matter(order: list[str], drawn: list[EngineView], prompt: int) -> None:
    roles = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}
    views = {
        name: replace(engine, endpoint=replace(engine.endpoint, engine_id=name, role=roles[name[0]]))
        for name, engine in zip(sorted(order), drawn, strict=True)
    }
    request = ask(prompt, p1=64, d2=prompt // 2)
    policy = KVAware(RULES)
    ordered = policy.choose(request, cluster(*(views[name] for name in sorted(order))))
    assert policy.choose(request, cluster(*(views[name] for name in order))) == ordered


@given(P0, D0, Prompts)
def test_predictions_are_times(prefill: EngineView, decode: EngineView, prompt: int) -> None:
    model = CostModel(ask(prompt), 0.0, RULES)
    for prediction in (model.pair(prefill, decode), model.local(decode)):
        assert min(prediction.ttft, prediction.handoff_gap, prediction.tpot, prediction.cost) >= 0


def test_a_likely_prefix_counts_like_one_that_was_announced() -> None:
    state = cluster(view("p0", Role.PREFILL), view("p1", Role.PREFILL), view("d0", Role.DECODE))
    request = replace(ask(500), hits={("p1", 1): PrefixHit(tokens=0, likely_tokens=480)})
    route = KVAware(RULES).choose(request, state)
    assert (route.prefill.engine_id, route.uncached_tokens) == ("p1", 20)


@given(P0, D0, Prompts, st.floats(0, 1), st.floats(0, 10))
def test_what_a_tier_holds_costs_its_restore_but_never_more_than_computing_it(
    prefill: EngineView, decode: EngineView, prompt: int, share: float, seconds: float
) -> None:
    """In the pool is cheapest, then a fast tier, then a slow one; the slowest is as good as none."""
    tokens = int(share * prompt)

    def cost(held: int, below: int, taking: float) -> tuple[float, ...]:
        hit = PrefixHit(tokens=held, likely_tokens=held, restored_tokens=below, restore_seconds=taking)
        request = replace(ask(prompt), hits={prefill.key: hit, decode.key: hit})
        return costs(request, prefill, decode)

    ladder = [cost(tokens, 0, 0.0), cost(tokens, tokens, seconds), cost(tokens, tokens, 2 * seconds), cost(0, 0, 0.0)]
    for cheaper, dearer in pairwise(ladder):
        assert all(one <= other * (1 + 1e-9) for one, other in zip(cheaper, dearer, strict=True))


def test_a_backlog_is_worked_off_between_snapshots() -> None:
    busy, idle = view("p0", Role.PREFILL, backlog=1000), view("p1", Role.PREFILL, backlog=300)
    d0 = view("d0", Role.DECODE)
    early, late = (CostModel(ask(500), now, RULES) for now in (0.0, 60.0))
    assert early.pair(busy, d0).ttft > early.pair(idle, d0).ttft
    assert late.pair(busy, d0).ttft == late.pair(idle, d0).ttft


def test_a_prompt_booked_after_the_snapshot_is_worked_off_once_those_before_it_are() -> None:
    per_token = STEP.base / 512 + STEP.per_token
    booked = Booked(unseen=(BookedPrompt(200, 0.5 * 100 * per_token),))
    engine = view("p0", Role.PREFILL, backlog=100, booked=booked)
    left = [load.backlog_tokens(engine, tokens * per_token) for tokens in (0, 60, 100, 250, 400)]
    assert left == pytest.approx([300, 240, 200, 50, 0])
    idle = view("p1", Role.PREFILL, booked=Booked(unseen=(BookedPrompt(200, 1.0),)))
    assert load.backlog_tokens(idle, 1.0) == pytest.approx(200)
    assert load.backlog_tokens(idle, 1.0 + 50 * per_token) == pytest.approx(150)


def test_time_in_which_an_engine_had_nothing_to_do_works_off_no_later_prompt() -> None:
    per_token = STEP.base / 512 + STEP.per_token
    late = 1000 * per_token
    engine = view("p0", Role.PREFILL, booked=Booked(unseen=(BookedPrompt(10, 0.0), BookedPrompt(200, late))))
    assert load.backlog_tokens(engine, late) == pytest.approx(200)
    assert load.backlog_tokens(engine, late + 50 * per_token) == pytest.approx(150)


def test_prompts_behind_one_that_is_not_computed_are_all_ahead_however_slow_the_engine_is() -> None:
    prompts = tuple(BookedPrompt(200, 0.0) for _ in range(4))
    engine = view("p0", Role.PREFILL, booked=Booked(behind_tokens=600, unseen=prompts))
    assert load.backlog_tokens(engine, 1000.0) == 600


def test_a_cached_prefix_wins_until_its_engine_is_too_busy() -> None:
    def choose(backlog: int) -> str:
        views = view("p0", Role.PREFILL), view("p1", Role.PREFILL, backlog=backlog), view("d0", Role.DECODE)
        return KVAware(replace(RULES, fetch=False)).choose(ask(500, p1=400), cluster(*views)).prefill.engine_id

    assert [choose(backlog) for backlog in (0, 300, 900)] == ["p1", "p1", "p0"]


def test_a_second_copy_of_a_prefix_is_made_where_memory_is_free_and_not_where_it_displaces_others() -> None:
    """p1 holds half the prompt and has a queue about as long as computing it; p0 is idle."""

    def chosen(filled: float) -> str:
        holder = view("p1", Role.PREFILL, backlog=400)
        views = [replace(engine, kv_filled=filled) for engine in (view("p0", Role.PREFILL), holder)]
        request = ask(500, p1=240)
        rules = replace(RULES, fetch=False)
        return KVAware(rules).choose(request, cluster(*views, view("d0", Role.DECODE))).prefill.engine_id

    assert (chosen(0.0), chosen(1.0)) == ("p0", "p1")


def test_an_answer_is_not_written_amid_prompts_because_decode_engines_are_full() -> None:
    """A full one makes it wait for a row, a prefill engine for a whole step of prompts with each token."""
    full = view("d0", Role.DECODE, used=1024)
    for prefill, mode in (
        (view("p0", Role.PREFILL), Mode.PREFILL_LOCAL),
        (view("p0", Role.PREFILL, backlog=20_000), Mode.DISAGGREGATED),
        (view("p0", Role.PREFILL, recent_work=100.0), Mode.DISAGGREGATED),
    ):
        assert KVAware(RULES).choose(ask(500, max_tokens=8), cluster(prefill, full)).mode is mode


def test_recent_work_settles_ties() -> None:
    views = view("p0", Role.PREFILL, recent_work=3.0), view("p1", Role.PREFILL, recent_work=1.0)
    route = KVAware(RULES).choose(ask(), cluster(*views, view("d0", Role.DECODE)))
    assert route.prefill.engine_id == "p1"


def test_a_short_prompt_stays_on_its_decode_engine_unless_that_is_swamped() -> None:
    def mode(backlog: int) -> Mode:
        views = view("p0", Role.PREFILL), view("d0", Role.DECODE), view("d1", Role.DECODE, backlog=backlog)
        return KVAware(RULES).choose(ask(500, d1=490), cluster(*views)).mode

    assert [mode(backlog) for backlog in (0, 100, 5000)] == [
        Mode.DECODE_LOCAL,
        Mode.DECODE_LOCAL,
        Mode.DISAGGREGATED,
    ]


def test_the_route_keeps_what_it_was_chosen_over_cheapest_first() -> None:
    views = [view(f"p{i}", Role.PREFILL, backlog=100 * i) for i in range(4)]
    views += [view(f"d{i}", Role.DECODE, running=i) for i in range(4)]
    route = KVAware(RULES).choose(ask(), cluster(*views))
    assert (route.prefill.engine_id, route.decode.engine_id) == ("p0", "d0")
    assert route.prediction is not None
    assert len(route.alternatives) == RULES.max_alternatives
    assert [c.cost for c in route.alternatives] == sorted(c.cost for c in route.alternatives)
    assert all("first token in" in candidate.reason for candidate in route.alternatives)
    assert route.prediction.cost <= route.alternatives[0].cost


def test_hundreds_of_engines_are_pruned_to_the_best_of_each_pool() -> None:
    views = [view(f"p{i:03}", Role.PREFILL, backlog=(i * 37) % 300) for i in range(300)]
    views += [view(f"d{i:03}", Role.DECODE, running=(i * 41) % 60) for i in range(300)]
    state = cluster(*views)
    choices = ranked(ask(), find_options(ask(), state, RULES), state, RULES)
    assert len(choices) == RULES.pool_top**2
    _, prefill, decode, _ = choices[0]
    assert (prefill.endpoint.engine_id, decode.others_requests) == ("p000", 0)


def chosen(views: Sequence[EngineView], prompts: int = 200) -> list[Route]:
    """Routes of prompts that differ in nothing but what they say."""
    policy, state = KVAware(RULES), cluster(*views)
    return [policy.choose(replace(ask(), prompt_name=b"%d" % number), state) for number in range(prompts)]


@pytest.mark.parametrize(("left", "taken"), [(0.001, {"p0", "p1"}), (3.0, {"p1"})])
def test_what_is_left_of_load_long_past_does_not_decide(left: float, taken: set[str]) -> None:
    views = [view("p0", Role.PREFILL, recent_work=left), view("p1", Role.PREFILL), view("d0", Role.DECODE)]
    assert {route.prefill.engine_id for route in chosen(views)} == taken


def test_equal_engines_share_prompts_evenly_and_each_prompt_has_its_place() -> None:
    views = [view(f"p{i}", Role.PREFILL) for i in range(2)] + [view(f"d{i}", Role.DECODE) for i in range(3)]
    routes = chosen(views)
    for pool, size in (([route.prefill for route in routes], 2), ([route.decode for route in routes], 3)):
        counts = Counter(endpoint.engine_id for endpoint in pool)
        assert len(counts) == size
        assert max(counts.values()) < 1.4 * len(routes) / size
    assert chosen(views[::-1]) == routes


def test_when_one_of_equal_engines_leaves_only_its_prompts_move() -> None:
    views = [view(f"p{i}", Role.PREFILL) for i in range(3)] + [view("d0", Role.DECODE)]
    before, after = chosen(views), chosen(views[1:])
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a.prefill != b.prefill]
    assert {a.prefill.engine_id for a, _ in moved} == {"p0"}
    assert {b.prefill.engine_id for _, b in moved} == {"p1", "p2"}


def test_a_decode_engine_that_is_dearer_by_more_than_the_prediction_can_tell_is_not_taken() -> None:
    def taken(running: int) -> set[str]:
        decodes = [view("d0", Role.DECODE, running=running), view("d1", Role.DECODE)]
        return {route.decode.engine_id for route in chosen([view("p0", Role.PREFILL), *decodes])}

    assert taken(0) == {"d0", "d1"}
    assert taken(8) == {"d1"}


def test_a_choice_among_equals_says_so_when_another_was_a_little_cheaper() -> None:
    model = StepModel(base=0.01, per_token=1e-5, per_context=0.0)
    decodes = [view(f"d{i}", Role.DECODE, running=i, step_model=model) for i in range(2)]
    routes = chosen([view("p0", Role.PREFILL), *decodes])
    assert {route.decode.engine_id for route in routes} == {"d0", "d1"}
    for route in routes:
        assert ("settled by the prompt among equals" in route.reason) is (route.decode.engine_id == "d1")


def test_a_request_that_is_about_to_end_counts_for_the_steps_it_still_takes() -> None:
    def tpot(*decoding: BookedDecode) -> float:
        engine = view("d0", Role.DECODE, booked=Booked(decoding=decoding))
        return CostModel(ask(max_tokens=100), 0.0, RULES).pair(view("p0", Role.PREFILL), engine).tpot

    alone, with_a_long_one = tpot(), tpot(BookedDecode(100, 500))
    assert tpot(BookedDecode(0, 500)) == pytest.approx(alone)
    assert tpot(BookedDecode(50, 500)) == pytest.approx((alone + with_a_long_one) / 2)
    assert tpot(BookedDecode(1000, 500)) == pytest.approx(with_a_long_one)
