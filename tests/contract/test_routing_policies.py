"""What every routing policy must keep to, the example of the recipe included."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.core.cluster import (
    Booked,
    BookedDecode,
    BookedPrompt,
    ClusterState,
    EngineKey,
    EngineView,
    Mode,
    Route,
    RouteAsk,
)
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.router.loading import load_policy
from pdserve.router.policies import BUILT_IN
from pdserve.router.policy import RoutingPolicy
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import ask, cluster, hits, view

RULES = RoutingRules(decode_local_below=32)
RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "add-a-routing-policy.md"


@pytest.fixture(scope="module", params=[*BUILT_IN, "sticky_routing:Sticky"])
def name(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Each built-in policy, and the recipe's example as an operator would add it."""
    code = re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    directory = tmp_path_factory.mktemp("operator")
    (directory / "sticky_routing.py").write_text(code[0])
    sys.path.insert(0, str(directory))
    yield request.param
    sys.path.remove(str(directory))
    sys.modules.pop("sticky_routing", None)


@pytest.fixture
def policy(name: str) -> RoutingPolicy:
    return load_policy(name, RULES)


@st.composite
def states(draw: st.DrawFn) -> tuple[RouteAsk, ClusterState]:
    roles = draw(st.lists(st.sampled_from(Role), max_size=8))
    views = [
        view(
            f"e{i}",
            role,
            state=draw(st.sampled_from([EngineState.READY, EngineState.READY, *EngineState])),
            backlog=draw(st.integers(0, 5000)),
            running=draw(st.integers(0, 80)),
            used=draw(st.integers(0, 1024)),
            draining=draw(st.booleans()) and draw(st.booleans()),
        )
        for i, role in enumerate(roles)
    ]
    views = [v if draw(st.booleans()) else replace(v, load=None, capacity=None) for v in views]
    cached = {v.endpoint.engine_id: draw(st.integers(0, 600)) for v in views if draw(st.booleans())}
    excluded = tuple(v.endpoint.engine_id for v in views if draw(st.integers(0, 4)) == 0)
    parted = tuple(v.endpoint.engine_id for v in views if draw(st.integers(0, 4)) == 0)
    prefills = [v.endpoint.engine_id for v in views if v.endpoint.role is Role.PREFILL]
    views = [
        replace(v, lost_links=frozenset((p, 1) for p in prefills if draw(st.booleans())))
        if v.endpoint.role is Role.DECODE and draw(st.booleans())
        else v
        for v in views
    ]
    request = replace(ask(draw(st.integers(1, 600)), excluded=excluded, parted=parted), hits=hits(cached))
    return request, cluster(*views)


def allowed(request: RouteAsk, engine: EngineView) -> bool:
    ready = engine.endpoint.state is EngineState.READY and not (engine.load and engine.load.draining)
    return ready and engine.key not in request.excluded


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(states())
def test_a_route_names_engines_that_may_have_the_request(
    policy: RoutingPolicy, drawn: tuple[RouteAsk, ClusterState]
) -> None:
    request, state = drawn
    usable = {v.endpoint: v for v in state.engines if allowed(request, v)}
    try:
        route = policy.choose(request, state)
    except Unavailable:
        assert not usable, "with fallback allowed, any usable engine can serve"
        return
    assert {route.prefill, route.decode} <= usable.keys()
    if route.mode is Mode.DISAGGREGATED:
        assert route.link[0] not in usable[route.decode].lost_links
        assert request.parted.isdisjoint(route.link)
    _check_mode(route)
    assert route.reason
    _check_beginning(route, request, usable[route.prefill], {view.key for view in usable.values()})


def _check_beginning(route: Route, request: RouteAsk, prefill: EngineView, usable: set[EngineKey]) -> None:
    """What is not computed is cached, or fetched from another engine that has announced it and can be read from."""
    if route.fetch is None:
        assert route.uncached_tokens == request.uncached(prefill.key)
        return
    source = route.fetch.source.engine_id, route.fetch.source.epoch
    assert route.uncached_tokens == request.prompt_tokens - route.fetch.tokens < request.uncached(prefill.key)
    assert route.fetch.tokens <= request.hits[source].tokens
    assert source in usable - {prefill.key} - prefill.lost_links - request.parted


def _check_mode(route: Route) -> None:
    match route.mode:
        case Mode.DISAGGREGATED:
            assert (route.prefill.role, route.decode.role) == (Role.PREFILL, Role.DECODE)
        case Mode.DECODE_LOCAL:
            assert route.prefill == route.decode
            assert route.decode.role is not Role.PREFILL
        case Mode.PREFILL_LOCAL:
            assert route.prefill == route.decode
            assert route.prefill.role is Role.PREFILL


def test_a_short_prompt_is_computed_where_it_is_decoded(policy: RoutingPolicy) -> None:
    state = cluster(view("p0", Role.PREFILL), view("d0", Role.DECODE))
    assert policy.choose(ask(31), state).mode is Mode.DECODE_LOCAL
    assert policy.choose(ask(32), state).mode is Mode.DISAGGREGATED


def test_all_engines_get_their_share_of_different_prompts(policy: RoutingPolicy) -> None:
    """Load is what the router books: each route makes its engines busier."""
    views = {n: view(n, Role.PREFILL) for n in ("p0", "p1", "p2")} | {n: view(n, Role.DECODE) for n in ("d0", "d1")}
    chosen = set()
    for number in range(24):
        route = policy.choose(replace(ask(500), request_id=f"r{number}"), cluster(*views.values()))
        chosen |= {route.prefill.engine_id, route.decode.engine_id}
        _book(views, route)
    assert chosen == views.keys()


def _book(views: dict[str, EngineView], route: Route) -> None:
    """A prompt of 500 tokens and an answer of 32, as a ledger books them."""
    prefill = views[route.prefill.engine_id]
    booked = replace(
        prefill.booked,
        prefilling=prefill.booked.prefilling + 1,
        prompt_tokens=prefill.booked.prompt_tokens + 500,
        unseen=(*prefill.booked.unseen, BookedPrompt(500, 0.0)),
    )
    views[route.prefill.engine_id] = replace(prefill, booked=booked)
    decode = views[route.decode.engine_id]
    booked = replace(
        decode.booked,
        decoding=(*decode.booked.decoding, BookedDecode(32, 500)),
        reserved_tokens=decode.booked.reserved_tokens + 532,
    )
    views[route.decode.engine_id] = replace(decode, booked=booked)


def test_round_robin_takes_turns_and_prefix_goes_where_the_prefix_is() -> None:
    state = cluster(*(view(n, Role.PREFILL) for n in ("p0", "p1")), view("d0", Role.DECODE))
    turns = load_policy("round_robin", RULES)
    first, second, *again = (turns.choose(ask(), state).prefill.engine_id for _ in range(4))
    assert {first, second} == {"p0", "p1"}
    assert again == [first, second]
    busy = cluster(view("p0", Role.PREFILL), view("p1", Role.PREFILL, backlog=9000), view("d0", Role.DECODE))
    holder = ask(500, p1=480)
    assert load_policy("prefix", RULES).choose(holder, busy).prefill.engine_id == "p1"
    assert load_policy("least_loaded", RULES).choose(holder, busy).prefill.engine_id == "p0"


def test_the_scores_of_peers_weigh_a_prefix_against_load_as_published() -> None:
    def chosen(policy: str, tokens: int, cached: int = 480) -> str:
        """So many of 500 tokens are cached on p1, which has prompts of that many tokens to compute."""
        busy = Booked(prefilling=1, prompt_tokens=tokens)
        prefills = view("p0", Role.PREFILL), view("p1", Role.PREFILL, booked=busy)
        state = cluster(*prefills, view("d0", Role.DECODE))
        return load_policy(policy, RULES).choose(ask(500, p1=cached), state).prefill.engine_id

    assert chosen("dynamo", 479) == "p1", "479 + 20 tokens are fewer than 500"
    assert chosen("dynamo", 481) == "p0"
    assert chosen("llm_d", 100_000) == "p1", "it has more than 0.8 of the prompt"
    assert chosen("llm_d", 1_000_000) == "p0", "which is not worth waiting for more than 18 s"
    assert chosen("llm_d", 1000, cached=399) == "p0", "it has less than 0.8 of the prompt"


def test_the_scores_of_peers_count_what_decodes_as_published() -> None:
    few_long = Booked(decoding=(BookedDecode(8, 2000),), reserved_tokens=2008)
    many_short = Booked(decoding=(BookedDecode(500, 200),) * 3, reserved_tokens=2100)
    decodes = view("d0", Role.DECODE, booked=few_long), view("d1", Role.DECODE, booked=many_short)
    state = cluster(view("p0", Role.PREFILL), *decodes)
    assert load_policy("dynamo", RULES).choose(ask(500), state).decode.engine_id == "d1", "600 tokens of prompts"
    assert load_policy("llm_d", RULES).choose(ask(500), state).decode.engine_id == "d0", "one request"


def test_the_scores_of_peers_for_engines_that_do_both() -> None:
    """480 of 500 tokens are cached on u1."""

    def chosen(policy: str, used: int) -> str:
        state = cluster(view("u0", Role.UNIFIED), view("u1", Role.UNIFIED, used=used))
        return load_policy(policy, RULES).choose(ask(500, u1=480), state).decode.engine_id

    assert chosen("dynamo", 1024) == "u1", "what counts is what requests hold that run"
    assert chosen("llm_d", 1024) == "u1", "3 · 0.96 for the prefix are more than 2 for an empty memory"
    lru = load_policy("llm_d", RULES)
    cold = cluster(*(view(name, Role.UNIFIED) for name in ("u0", "u1", "u2")))
    assert {lru.choose(ask(500), cold).decode.engine_id for _ in range(3)} == {"u0", "u1", "u2"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("fastest", "neither one of dynamo, kv_aware, least_loaded, llm_d, prefix, round_robin nor of the form"),
        ("no.such.module:Policy", "cannot import no.such.module"),
        ("json:Policy", "module json has no Policy"),
        ("builtins:object", "must take the RoutingRules as its only argument"),
        ("builtins:str", r"has no method choose\(ask, state\)"),
    ],
)
def test_a_policy_that_cannot_be_had_is_an_error_that_says_why(bad: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(bad, RULES)
