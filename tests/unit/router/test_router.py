"""The router: hits looked up by the engines' own names for blocks, expectations noted, decode engines re-confirmed."""

from dataclasses import replace

import pytest

from pdserve.core.blocks import KVSnapshot, Tier, block_hashes, hash_namespace
from pdserve.core.cluster import Booked, BookedDecode, BookedPrompt, EngineView, Mode
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.core.request import Request, SamplingParams
from pdserve.core.tiers import TierTally
from pdserve.router.kv_index import KVIndex
from pdserve.router.policies import KVAware, RoundRobin
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import BLOCK_SIZE, cluster, view

RULES = RoutingRules(decode_local_below=32)
PROMPT = tuple(range(200))


class Bench:
    def __init__(self) -> None:
        self.index = KVIndex()
        self.router = Router(KVAware(RULES), self.index, RULES)

    def hold(
        self, engine: str, num_tokens: int, *, salt: bytes = b"", revision: str = "r1", tier: Tier | None = None
    ) -> None:
        hashes = block_hashes(PROMPT[:num_tokens], BLOCK_SIZE, hash_namespace(salt, revision))
        self.index.restore((engine, 1), KVSnapshot(number=0, hashes=tuple(hashes), first=True, last=True, tier=tier))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def request(request_id: str = "r", *, salt: bytes = b"", max_tokens: int = 16) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens)
    return Request(id=request_id, prompt_token_ids=PROMPT, sampling=sampling, salt=salt)


def two_by_two(**changed: EngineView) -> tuple[EngineView, ...]:
    views = {name: view(name, Role.DECODE) for name in ("d0", "d1")}
    views |= {name: view(name, Role.PREFILL) for name in ("p0", "p1")}
    return tuple((views | changed).values())


def test_a_prompt_goes_where_its_beginning_is_held(bench: Bench) -> None:
    bench.hold("p1", 160)
    route = bench.router.route(request(), cluster(*two_by_two()))
    assert (route.prefill.engine_id, route.uncached_tokens) == ("p1", 40)


@pytest.mark.parametrize(
    ("seconds_per_block", "chosen"), [(0.0, "p1"), (1e-9, "p1"), (10.0, "p0")], ids=["unknown", "fast", "slow"]
)
def test_a_tier_that_restores_slowly_draws_no_prompt(bench: Bench, seconds_per_block: float, chosen: str) -> None:
    """p1 holds the prompt on disk, p0 a shorter part of it in its pool."""
    bench.hold("p0", 64)
    bench.hold("p1", 192, tier=Tier.DISK)
    p1 = view("p1", Role.PREFILL)
    assert p1.load
    tally = TierTally(tier=Tier.DISK, capacity=99, blocks=12, seconds_per_block=seconds_per_block)
    views = two_by_two(p1=replace(p1, load=replace(p1.load, tiers=(tally,))))
    assert bench.router.route(request(), cluster(*views)).prefill.engine_id == chosen


@pytest.mark.parametrize("other", [{"salt": b"tenant"}, {"revision": "r2"}], ids=["tenant", "model"])
def test_blocks_of_another_tenant_or_model_are_no_hits(bench: Bench, other: dict[str, str]) -> None:
    bench.hold("p1", 160, **other)  # type: ignore[arg-type]  # one keyword of either type
    route = bench.router.route(request(), cluster(*two_by_two()))
    assert route.uncached_tokens == 200


def test_the_second_of_two_equal_prompts_follows_the_first(bench: Bench) -> None:
    for engine in ("p0", "p1", "d0", "d1"):
        bench.hold(engine, 0)
    views = two_by_two(p0=view("p0", Role.PREFILL, backlog=20))
    first = bench.router.route(request("a"), cluster(*views))
    assert first.prefill.engine_id == "p1"
    # Its prompt now waits there, which without the expectation would make the other engine the better one.
    busy = view("p1", Role.PREFILL, booked=Booked(unseen=(BookedPrompt(150, 0.0),)))
    views = two_by_two(p0=view("p0", Role.PREFILL, backlog=20), p1=busy)
    second = bench.router.route(request("b"), cluster(*views))
    assert second.prefill.engine_id == "p1"
    assert "not announced" not in first.reason
    assert "8 of 200 prompt tokens to compute (192 expected in its cache, not announced)" in second.reason
    assert bench.router.route(request("c", salt=b"x"), cluster(*views)).prefill.engine_id == "p0"


def test_a_prompt_that_came_to_nothing_draws_no_other(bench: Bench) -> None:
    for engine in ("p0", "p1", "d0", "d1"):
        bench.hold(engine, 0)
    bench.hold("p1", 160)
    failed = bench.router.route(request("a"), cluster(*two_by_two(), now=5.0))
    assert failed.prefill.engine_id == "p1"
    bench.router.retract(request("a"), failed, since=5.0)
    assert bench.index.num_expected == 0


def test_excluded_incarnations_are_avoided(bench: Bench) -> None:
    bench.hold("p1", 160)
    route = bench.router.route(request(), cluster(*two_by_two()), frozenset({("p1", 1), ("d0", 1)}))
    assert (route.prefill.engine_id, route.decode.engine_id) == ("p0", "d1")


def test_ready_means_that_some_engine_can_take_a_long_prompt(bench: Bench) -> None:
    assert bench.router.ready(cluster(*two_by_two()))
    assert not bench.router.ready(cluster(view("p0", Role.PREFILL, state=EngineState.SUSPECT)))
    strict = Router(KVAware(RULES), KVIndex(), replace(RULES, fallback=False))
    assert not strict.ready(cluster(view("p0", Role.PREFILL)))


def rebound(bench: Bench, current: EngineView, other: EngineView) -> str:
    route = bench.router.route(request(), cluster(*two_by_two()))
    assert route.decode.engine_id == "d0"
    return bench.router.rebind(request(), route, cluster(*two_by_two(d0=current, d1=other))).decode.engine_id


def test_a_decode_engine_is_left_only_for_a_clearly_better_one(bench: Bench) -> None:
    ours = Booked(decoding=(BookedDecode(16, 200),), reserved_tokens=216)
    idle = view("d1", Role.DECODE)
    assert rebound(bench, view("d0", Role.DECODE, booked=ours), idle) == "d0"
    assert rebound(bench, view("d0", Role.DECODE, booked=ours, running=3), idle) == "d0"
    assert rebound(bench, view("d0", Role.DECODE, booked=ours, running=63), idle) == "d1"


def test_decoding_does_not_move_to_where_the_answer_would_be_cut_short(bench: Bench) -> None:
    longest = len(PROMPT) + request().sampling.max_tokens
    for max_len, chosen in ((longest - 1, "d0"), (longest, "d1")):
        assert rebound(bench, view("d0", Role.DECODE, running=63), view("d1", Role.DECODE, max_len=max_len)) == chosen


def test_a_decode_engine_that_is_gone_is_replaced_at_once(bench: Bench) -> None:
    gone = view("d0", Role.DECODE, state=EngineState.SUSPECT)
    assert rebound(bench, gone, view("d1", Role.DECODE, running=60)) == "d1"
    with pytest.raises(Unavailable, match="no decode engine"):
        rebound(bench, gone, view("d1", Role.DECODE, draining=True))


def test_a_request_that_tries_a_lost_link_stays_on_it_and_none_moves_to_one(bench: Bench) -> None:
    assert rebound(bench, view("d0", Role.DECODE, lost_links=("p0", "p1")), view("d1", Role.DECODE)) == "d0"
    gone = view("d0", Role.DECODE, state=EngineState.SUSPECT)
    with pytest.raises(Unavailable, match="no decode engine"):
        rebound(bench, gone, view("d1", Role.DECODE, lost_links=("p0", "p1")))


def test_without_predictions_a_decode_engine_is_kept_while_it_is_there() -> None:
    router = Router(RoundRobin(RULES), KVIndex(), RULES)
    route = router.route(request(), cluster(*two_by_two()))
    busy = two_by_two(d0=view("d0", Role.DECODE, running=63))
    assert router.rebind(request(), route, cluster(*busy)) is route
    gone = two_by_two(d0=view("d0", Role.DECODE, state=EngineState.DEAD))
    moved = router.rebind(request(), route, cluster(*gone))
    assert (moved.prefill, moved.decode.engine_id) == (route.prefill, "d1")
    assert "moved from d0" in moved.reason


def test_what_a_prompt_says_places_it_not_who_asks_or_when(bench: Bench) -> None:
    routes = [bench.router.route(request(f"r{number}"), cluster(*two_by_two())) for number in range(5)]
    assert len({(route.prefill, route.decode) for route in routes}) == 1
    other_gateway = Router(KVAware(RULES), KVIndex(), RULES).route(request("z"), cluster(*two_by_two()))
    assert (other_gateway.prefill, other_gateway.decode) == (routes[0].prefill, routes[0].decode)


def test_local_routes_stay(bench: Bench) -> None:
    alone = cluster(view("d0", Role.DECODE))
    route = bench.router.route(request(), alone)
    assert route.mode is Mode.DECODE_LOCAL
    assert bench.router.rebind(request(), route, alone) is route


def test_a_running_request_moves_to_the_decode_engine_that_serves_it_best(bench: Bench) -> None:
    busy = view("d1", Role.DECODE, booked=Booked(decoding=(BookedDecode(100, 1_000),) * 20))
    views = (*two_by_two(d1=busy), view("d2", Role.DECODE))
    assert bench.router.move(request(), ("d0", 1), cluster(*views)).engine_id == "d2"


@pytest.mark.parametrize(
    "other",
    [
        view("d1", Role.DECODE, draining=True),
        view("d1", Role.DECODE, state=EngineState.SUSPECT),
        view("d1", Role.DECODE, lost_links=("d0",)),
        view("d1", Role.DECODE, num_blocks=13, used=5),
        view("d1", Role.DECODE, max_len=215),
        view("d1", Role.PREFILL),
    ],
    ids=["draining", "suspect", "no link", "full", "shorter", "prefill"],
)
def test_a_running_request_stays_rather_than_going_where_it_cannot(bench: Bench, other: EngineView) -> None:
    with pytest.raises(Unavailable, match="no other engine has room"):
        bench.router.move(request(), ("d0", 1), cluster(*two_by_two(d1=other)))


def test_a_running_request_moves_where_it_may_become_no_longer_than_here(bench: Bench) -> None:
    alike = two_by_two(d0=view("d0", Role.DECODE, max_len=210), d1=view("d1", Role.DECODE, max_len=210))
    assert bench.router.move(request(), ("d0", 1), cluster(*alike)).engine_id == "d1"


def test_a_running_request_moves_to_an_engine_that_rounds_alike_if_that_has_room(bench: Bench) -> None:
    def chosen(alike: EngineView) -> str:
        here, other = view("d0", Role.DECODE, numerics="a"), view("d1", Role.DECODE, numerics="b")
        return bench.router.move(request(), ("d0", 1), cluster(here, other, alike)).engine_id

    assert chosen(view("d2", Role.DECODE, numerics="a", running=30)) == "d2"
    assert chosen(view("d2", Role.DECODE, numerics="a", used=1024)) == "d1"


def test_decoding_is_not_moved_before_it_begins_to_an_engine_that_rounds_otherwise(bench: Bench) -> None:
    busy = view("d0", Role.DECODE, running=63, numerics="a")
    assert rebound(bench, busy, view("d1", Role.DECODE, numerics="b")) == "d0"
    assert rebound(bench, busy, view("d1", Role.DECODE, numerics="a")) == "d1"
    gone = replace(busy, endpoint=replace(busy.endpoint, state=EngineState.SUSPECT))
    assert rebound(bench, gone, view("d1", Role.DECODE, numerics="b")) == "d1"
