"""Domains: near engines are preferred by what it costs to go far, or nothing leaves a domain."""

from dataclasses import replace

import pytest

from pdserve.core.cluster import EngineView, Mode, Route
from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable
from pdserve.core.request import Request, SamplingParams
from pdserve.router.fetching import best_fetch
from pdserve.router.kv_index import KVIndex
from pdserve.router.options import find_options
from pdserve.router.policies import KVAware, LeastLoaded
from pdserve.router.policy import RoutingPolicy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import are_apart, handoff_seconds_per_token, may_carry
from tests.unit.router.views import ask, cluster, view

PREFERRED = RoutingRules()
REQUIRED = RoutingRules(topology="required")
PROMPT = tuple(range(500))


def prefill(name: str, domain: str, **facts: int) -> EngineView:
    return view(name, Role.PREFILL, domain=domain, **facts)  # type: ignore[arg-type]  # whole numbers only


def decode(name: str, domain: str, running: int = 0, speeds: dict[str, float] | None = None) -> EngineView:
    return view(name, Role.DECODE, domain=domain, running=running, handoff_speeds=speeds)


def pair(route: Route) -> tuple[str, str]:
    return route.prefill.engine_id, route.decode.engine_id


@pytest.mark.parametrize(("one", "other", "apart"), [("a", "b", True), ("a", "a", False), ("a", "", False)])
def test_engines_are_apart_when_both_name_another_domain(one: str, other: str, apart: bool) -> None:
    source, target = prefill("p0", one), decode("d0", other)
    assert are_apart(source, target) is apart
    assert may_carry(source, target, PREFERRED)
    assert may_carry(source, target, REQUIRED) is not apart


def test_a_far_link_costs_what_was_measured_and_never_less_than_a_near_one() -> None:
    near, p0 = PREFERRED.fetch_seconds_per_token, prefill("p0", "a")

    def price(target: EngineView) -> float:
        return handoff_seconds_per_token(p0, target, PREFERRED)

    assert price(decode("d0", "a", speeds={"p0": 1e-3})) == near
    assert price(decode("d0", "b")) == PREFERRED.far_factor * near
    assert price(decode("d0", "b", speeds={"p0": 3 * near})) == 3 * near
    assert price(decode("d0", "b", speeds={"p0": near / 3})) == near


@pytest.mark.parametrize("turned", [False, True])
def test_of_engines_alike_a_pair_in_one_domain_is_chosen_and_the_reason_says_so(turned: bool) -> None:
    ours, theirs = ("b", "a") if turned else ("a", "b")
    state = cluster(prefill("p0", ours, backlog=9000), prefill("p1", theirs), decode("d0", ours), decode("d1", theirs))
    for number in range(20):
        route = KVAware(PREFERRED).choose(replace(ask(2000), prompt_name=bytes([number])), state)
        assert pair(route) == ("p1", "d1")
        assert route.reason.endswith(f"within domain {theirs}")
    far = next(c for c in route.alternatives if (c.prefill, c.decode) == ("p1", "d0"))
    assert far.reason.endswith(f"from domain {theirs} to {ours}")


def test_a_preference_gives_way_to_load_and_a_requirement_does_not() -> None:
    state = cluster(prefill("p0", "a"), decode("d0", "a", running=60), decode("d1", "b"))
    assert pair(KVAware(PREFERRED).choose(ask(500, max_tokens=200), state)) == ("p0", "d1")
    assert pair(KVAware(REQUIRED).choose(ask(500, max_tokens=200), state)) == ("p0", "d0")


def test_a_slow_measured_link_is_avoided_where_the_preset_would_not() -> None:
    def choose(speed: float) -> tuple[str, str]:
        far = decode("d1", "b", speeds={"p0": speed})
        return pair(KVAware(PREFERRED).choose(ask(500), cluster(prefill("p0", "a"), decode("d0", "a", running=6), far)))

    assert choose(2e-6) == ("p0", "d1")
    assert choose(1e-2) == ("p0", "d0")


@pytest.mark.parametrize("policy", [KVAware, LeastLoaded])
def test_required_finds_the_pairs_there_are_however_the_best_of_each_pool_lie(policy: type[RoutingPolicy]) -> None:
    """The best prefill engines are all in one domain, the best decode engines in another."""
    engines = [prefill(f"p{n}", "a") for n in range(6)] + [decode(f"d{n}", "b") for n in range(6)]
    engines += [prefill("p9", "b", backlog=50_000), decode("d9", "a", running=60)]
    route = policy(REQUIRED).choose(ask(500), cluster(*engines))  # type: ignore[call-arg]
    assert pair(route) in {("p9", f"d{n}") for n in range(6)} | {(f"p{n}", "d9") for n in range(6)}


def test_without_a_pair_in_one_domain_an_engine_does_everything_or_the_answer_says_why() -> None:
    state = cluster(prefill("p0", "a"), decode("d0", "b"))
    options = find_options(ask(500), state, REQUIRED)
    assert not options.pairs
    assert {option.mode for option in options.local} == {Mode.DECODE_LOCAL, Mode.PREFILL_LOCAL}
    assert {option.reason for option in options.local} == {"no handoff within a domain is possible"}
    with pytest.raises(Unavailable, match="of its domain"):
        find_options(ask(500), state, replace(REQUIRED, fallback=False))


@pytest.mark.parametrize(("rules", "busy"), [(PREFERRED, 0), (REQUIRED, 1)])
def test_of_many_engines_the_near_ones_are_on_the_short_list(rules: RoutingRules, busy: int) -> None:
    engines = [prefill(f"p{n:02}", f"rack{n}", backlog=10 * n) for n in range(40)]
    engines += [decode(f"d{n:02}", f"rack{n}", running=busy * (39 - n)) for n in range(40)]
    route = KVAware(rules).choose(ask(4000, max_tokens=8), cluster(*engines))
    domains = {each.endpoint.engine_id: each.domain for each in engines}
    assert domains[route.prefill.engine_id] == domains[route.decode.engine_id]


def test_prefixes_are_fetched_across_domains_at_a_price_or_not_at_all() -> None:
    p0, d0, d1 = prefill("p0", "a"), decode("d0", "a"), decode("d1", "b")
    wanted = ask(2000, d0=1600, d1=1600)
    near = best_fetch(wanted, p0, (d0,), PREFERRED)
    far = best_fetch(wanted, p0, (d1,), PREFERRED)
    assert near
    assert far
    assert far.seconds > near.seconds
    assert best_fetch(wanted, p0, (d1,), REQUIRED) is None


class Bench:
    def __init__(self, rules: RoutingRules) -> None:
        self.router = Router(KVAware(rules), KVIndex(), rules)
        self.request = Request(id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=32))


def test_a_running_request_moves_within_its_domain_first() -> None:
    engines = decode("d0", "a"), decode("d1", "b"), decode("d2", "a", running=1)
    source = ("d0", 1)
    preferred, required = Bench(PREFERRED), Bench(REQUIRED)
    assert required.router.move(required.request, source, cluster(*engines)).engine_id == "d2"
    busy = decode("d0", "a"), decode("d1", "b"), decode("d2", "a", running=60)
    assert preferred.router.move(preferred.request, source, cluster(*busy)).engine_id == "d1"
    with pytest.raises(Unavailable, match="no other engine has room"):
        required.router.move(required.request, source, cluster(*engines[:2]))


def test_a_reserved_engine_is_left_only_for_one_that_may_be_handed_to() -> None:
    state = cluster(prefill("p0", "a"), decode("d0", "a"), decode("d1", "b"), decode("d2", "a", running=1))
    bench = Bench(REQUIRED)
    route = replace(bench.router.route(bench.request, state), mode=Mode.DISAGGREGATED)
    gone = cluster(*(engine for engine in state.engines if engine.endpoint.engine_id != "d0"))
    assert bench.router.rebind(bench.request, route, gone).decode.engine_id == "d2"
    with pytest.raises(Unavailable):
        bench.router.rebind(bench.request, route, cluster(*gone.engines[:2]))
