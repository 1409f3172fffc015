"""The short list of many engines: whoever would win among all is on it."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.cluster import Booked, BookedDecode, BookedPrompt, ClusterState, EngineView, RouteAsk, StepModel
from pdserve.core.endpoint import EngineState, Role
from pdserve.router.cost import ranked
from pdserve.router.options import find_options
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from pdserve.router.shortlist import Shortlist
from tests.unit.router.views import STEP, ask, cluster, hits, view

RULES = RoutingRules()
SLOW = StepModel(base=0.004, per_token=2e-4, per_context=2e-7)


def engine(rng: Random, engine_id: str, role: Role) -> EngineView:
    answers = tuple(BookedDecode(256, rng.randrange(2000)) for _ in range(rng.randrange(8)))
    prompts = tuple(BookedPrompt(rng.randrange(3000), -rng.random()) for _ in range(rng.randrange(3)))
    return replace(
        view(
            engine_id,
            role,
            state=rng.choice([*[EngineState.READY] * 9, EngineState.SUSPECT]),
            backlog=rng.choice([0, 0, rng.randrange(5000)]),
            leased=rng.choice([0, 0, rng.randrange(1000)]),
            recent_work=rng.choice([0.0, 30 * rng.random()]),
            step_model=rng.choice([STEP, STEP, SLOW]),
            booked=Booked(
                decoding=answers,
                reserved_tokens=sum(map(sum, answers)),
                prefilling=len(prompts),
                prompt_tokens=sum(prompt.tokens for prompt in prompts),
                unseen=prompts,
            ),
        ),
        kv_filled=rng.choice([0.0, 1.0, rng.random()]),
    )


def many(seed: int, engines: int, roles: tuple[Role, ...]) -> tuple[RouteAsk, ClusterState]:
    rng = Random(seed)
    views = [engine(rng, f"e{number:03}", roles[number % len(roles)]) for number in range(engines)]
    held = {each.endpoint.engine_id: rng.randrange(3000) for each in rng.sample(views, rng.randrange(engines // 2))}
    wanted = replace(ask(3000, max_tokens=300), hits=hits(held), prompt_name=rng.randbytes(16))
    return wanted, cluster(*views)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(60, 120),
    st.sampled_from([(Role.PREFILL, Role.DECODE), (Role.UNIFIED,), tuple(Role)]),
)
def test_it_costs_no_more_to_choose_from_the_list_than_from_all(
    seed: int, engines: int, roles: tuple[Role, ...]
) -> None:
    wanted, state = many(seed, engines, roles)
    few = Shortlist(RULES).of(wanted, state)
    assert len(few.engines) < engines / 1.5
    best, least = (ranked(wanted, find_options(wanted, s, RULES), s, RULES)[0][0].cost for s in (few, state))
    # Of all engines, too, only each pool's best are paired.
    assert best <= 1.01 * least


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 59), st.booleans()), max_size=30))
def test_what_it_remembers_of_engines_follows_their_views(seed: int, changes: list[tuple[int, bool]]) -> None:
    wanted, state = many(seed, 60, (Role.PREFILL, Role.DECODE))
    rng, following = Random(seed), Shortlist(RULES)
    views = list(state.engines)
    for place, leaves in changes:
        if leaves and len(views) > 50:
            views.pop(place % len(views))
        else:
            old = views[place % len(views)].endpoint
            views[place % len(views)] = engine(rng, old.engine_id, old.role)
        now = cluster(*views)
        assert following.of(wanted, now) == Shortlist(RULES).of(wanted, now)


def test_few_engines_are_not_narrowed() -> None:
    state = cluster(*(view(f"p{n}", Role.PREFILL) for n in range(8)), *(view(f"d{n}", Role.DECODE) for n in range(8)))
    assert Shortlist(RULES).of(ask(), state) is state


def test_where_the_best_cannot_hand_over_to_one_another_all_engines_are_looked_at() -> None:
    prefills = [view(f"p{n:02}", Role.PREFILL) for n in range(30)]
    decodes = [view(f"d{n:02}", Role.DECODE, lost_links=tuple(f"p{p:02}" for p in range(29))) for n in range(30)]
    state = cluster(*prefills, *decodes)
    rng = Random(1)
    requests = [replace(ask(), prompt_name=rng.randbytes(16)) for _ in range(20)]
    assert any(Shortlist(RULES).of(request, state) is state for request in requests)
    assert {KVAware(RULES).choose(request, state).prefill.engine_id for request in requests} == {"p29"}
    one_lost = cluster(*prefills, *(replace(decode, lost_links=frozenset({("p00", 1)})) for decode in decodes))
    assert len(Shortlist(RULES).of(ask(), one_lost).engines) < 30
    sound = cluster(*prefills, *(view(f"d{n:02}", Role.DECODE) for n in range(30)))
    assert Shortlist(RULES).of(ask(parted=("p00",)), sound) is sound


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_an_idle_pool_takes_equal_prompts_by_turns(role: Role) -> None:
    """Among engines that are all alike, the prompt decides, and prompts differ."""
    state = cluster(*(view(f"{r.value}-{n:02}", r) for r in (Role.PREFILL, Role.DECODE) for n in range(40)))
    policy, rng = KVAware(RULES), Random(1)
    routes = [policy.choose(replace(ask(), prompt_name=rng.randbytes(16)), state) for _ in range(400)]
    chosen = {(r.prefill if role is Role.PREFILL else r.decode).engine_id for r in routes}
    assert len(chosen) == 40


def test_an_engine_that_alone_has_room_for_the_answer_is_listed_however_busy() -> None:
    views = [view(f"e{number:03}", (Role.PREFILL, Role.DECODE)[number % 2], max_len=3200) for number in range(80)]
    views[41] = view("e041", Role.DECODE, max_len=4000, running=60)
    few = Shortlist(RULES).of(ask(3000, max_tokens=300), cluster(*views))
    assert len(few.engines) < len(views)
    assert "e041" in {each.endpoint.engine_id for each in few.engines}
