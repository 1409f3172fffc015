"""Who goes, who waits, who is turned away, by what the best route promises."""

from dataclasses import replace
from random import Random

import pytest

from pdserve.core.admission import Rejection
from pdserve.core.cluster import Booked, BookedDecode, ClusterState, EngineView
from pdserve.core.endpoint import EngineState, Role
from pdserve.router.admission import AdmissionRules, Outlook, busy_for, judge, look_ahead
from pdserve.router.pace import Pace
from pdserve.router.policies import KVAware
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import ask, cluster, view

RULES = AdmissionRules(ttft=2.0, tpot=0.05, headroom=1.0, steps_ahead=0.5)
DECODE = view("d0", Role.DECODE)


def outlook(*engines: EngineView, prompt_tokens: int = 500, rules: AdmissionRules = RULES) -> Outlook:
    request, state = ask(prompt_tokens), cluster(*engines)
    return look_ahead(request, KVAware(RoutingRules()).choose(request, state), state, rules)


def decoding(requests: int, expected: int = 256) -> Booked:
    rows = tuple(BookedDecode(expected, 400) for _ in range(requests))
    return Booked(decoding=rows, reserved_tokens=requests * (400 + expected))


@pytest.mark.parametrize("prompt_tokens", [1, 500, 10_000])
def test_an_idle_cluster_takes_everything(prompt_tokens: int) -> None:
    assert outlook(view("p0", Role.PREFILL), DECODE, prompt_tokens=prompt_tokens).goes()


def test_a_request_goes_when_any_engine_of_the_pool_runs_out_of_prompts() -> None:
    busy = view("p0", Role.PREFILL, backlog=4000)
    assert not outlook(busy, DECODE).goes()
    assert outlook(busy, view("p1", Role.PREFILL, backlog=200), DECODE).goes()
    suspect = view("p1", Role.PREFILL, state=EngineState.SUSPECT)
    assert not outlook(busy, suspect, DECODE).goes(), "not by one that gets no work"


@pytest.mark.parametrize("seed", range(60))
def test_while_its_pool_is_said_to_be_busy_no_route_of_a_request_would_go(seed: int) -> None:
    rng = Random(seed)
    policy, request = KVAware(RoutingRules()), ask(rng.choice([20, 500, 3000]))
    contested, owed = rng.random() < 0.5, rng.random() < 0.5

    def at(now: float) -> ClusterState:
        def engine(name: str, role: Role) -> EngineView:
            prompts = Booked(prefilling=1, prompt_tokens=rng.choice([0, 100, 2000]), behind_tokens=rng.choice([0, 900]))
            idle = role is Role.DECODE or rng.random() < 0.3
            return view(name, role, booked=None if idle else prompts, backlog=0 if idle else rng.randrange(8000))

        pool = [engine(f"p{n}", Role.PREFILL) for n in range(2)]
        return cluster(*pool, engine("d0", Role.DECODE), engine("d1", Role.DECODE), now=now)

    then, now = at(0.0), at(rng.choice([0.0, 0.2]))
    busy = busy_for(policy.choose(request, then), then, now, RULES, contested=contested, owed=owed)
    fresh = look_ahead(request, policy.choose(request, now), now, RULES, contested=contested)
    assert busy in (None, fresh.idle_in)
    assert busy is None or not fresh.goes(owed=owed)
    # Nothing but a pool that is busy keeps a request here.
    assert busy is not None or fresh.goes(owed=owed)


def test_where_there_are_other_engines_or_rules_a_pool_is_not_taken_for_busy() -> None:
    full, request = view("p0", Role.PREFILL, backlog=8000), ask(500)
    then = cluster(full, DECODE)
    route = KVAware(RoutingRules()).choose(request, then)

    def busy(state: ClusterState) -> float | None:
        return busy_for(route, then, state, RULES, contested=False, owed=False)

    assert busy(then)
    assert busy(cluster(full, replace(DECODE, recent_work=1.0), now=0.1))
    for others in (
        cluster(full, view("p1", Role.PREFILL, backlog=9000), DECODE),
        cluster(view("p0", Role.PREFILL, backlog=8000, epoch=2), DECODE),
        cluster(view("p0", Role.PREFILL, backlog=8000, state=EngineState.SUSPECT), DECODE),
        cluster(view("p0", Role.UNIFIED, backlog=8000), DECODE),
        replace(then, bypass_below=1000),
    ):
        assert busy(others) is None


def test_while_others_ask_a_prompt_counts_in_full_until_it_is_computed() -> None:
    nearly_done = view("p0", Role.PREFILL, booked=Booked(prefilling=1, prompt_tokens=400))
    request, state = ask(500), cluster(nearly_done, DECODE)
    route = KVAware(RoutingRules()).choose(request, state)
    assert look_ahead(request, route, state, RULES).goes()
    assert not look_ahead(request, route, state, RULES, contested=True).goes()
    short = replace(nearly_done, booked=Booked(prefilling=1, prompt_tokens=20))
    assert look_ahead(request, route, cluster(short, DECODE), RULES, contested=True).goes()


def test_what_is_ahead_is_told_in_seconds_of_the_engine_that_is_free_first() -> None:
    found = outlook(view("p0", Role.PREFILL, backlog=8000), view("p1", Role.PREFILL, backlog=4000), DECODE)
    per_token = 0.002 / 512 + 1e-4
    assert found.idle_in == pytest.approx((4000 - 256) * per_token)
    assert found.engines == 2


def test_a_request_waits_while_no_engine_has_room_for_its_tokens() -> None:
    full = view("d0", Role.DECODE, used=1020, running=1)
    prefill = view("p0", Role.PREFILL, used=1020, running=1)
    assert outlook(prefill, full).full
    idle = (view("p0", Role.PREFILL, used=1020), view("d0", Role.DECODE, used=1020))
    assert not outlook(*idle).full, "who waits for an idle engine waits for nobody"
    assert not outlook(prefill, full, view("d1", Role.DECODE)).full


def test_a_request_waits_where_its_tokens_would_come_too_late_unless_waiting_does_not_help() -> None:
    prefill, many = view("p0", Role.PREFILL), replace(DECODE, booked=decoding(20))
    strict = replace(RULES, tpot=0.003)
    assert outlook(prefill, many, rules=strict).slow
    assert not outlook(prefill, DECODE, rules=strict).slow
    assert not outlook(prefill, many, rules=replace(RULES, tpot=0.001)).slow, "alone it would be late as well"


def waits(own: float = 0.1, idle_in: float = 1.0, engines: int = 2) -> Outlook:
    return Outlook(
        own=own, work=own, queue=idle_in, idle_in=idle_in, step=0.05, engines=engines, full=False, slow=False
    )


def test_who_has_had_less_than_its_share_goes_beside_what_runs_instead_of_behind_it() -> None:
    running = outlook(view("p0", Role.PREFILL, backlog=700), DECODE)
    assert not running.goes()
    assert running.goes(owed=True)
    queued = outlook(view("p0", Role.PREFILL, backlog=1000), DECODE)
    assert not queued.goes(owed=True)


def test_the_first_token_may_not_come_later_than_the_target() -> None:
    assert judge(waits(), RULES, ahead=1.6, pace=0.0, timeout=60).rejection is None
    verdict = judge(waits(), RULES, ahead=2.4, pace=0.0, timeout=60)
    assert verdict.rejection is Rejection.TTFT
    assert verdict.wait == pytest.approx(2.2)
    assert verdict.retry_after == pytest.approx(0.3), "by then that much less is ahead"
    assert judge(waits(), RULES, ahead=0.0, pace=2.5, timeout=60).rejection is Rejection.TTFT


def test_a_prompt_that_never_meets_the_target_may_wait_as_long_as_it_takes() -> None:
    assert judge(waits(own=5.0), RULES, ahead=6.0, pace=0.0, timeout=60).rejection is None
    assert judge(waits(own=5.0), RULES, ahead=10.0, pace=0.0, timeout=60).rejection is Rejection.TTFT


def test_nobody_waits_for_an_answer_its_client_will_not_wait_for() -> None:
    verdict = judge(waits(), RULES, ahead=0.6, pace=0.0, timeout=1.2)
    assert verdict.rejection is Rejection.DEADLINE
    assert verdict.retry_after == pytest.approx(0.2)


def test_the_pace_is_that_of_turns_taken_while_somebody_waited() -> None:
    pace = Pace()
    for number in range(20):
        pace.came(100.0 + number)
    assert pace.seconds(5, 130.0) > 20, "no turn yet: the time since then is that of one"
    for number in range(20):
        pace.left(140.0 + number / 10, served=True)
    assert pace.seconds(10, 142.0) == pytest.approx(10 * 30 * (1 - 2.718 ** -(42 / 30)) / 20, rel=0.1)
    before = pace.seconds(10, 142.0)
    assert pace.seconds(10, 150.0) == pytest.approx(before, rel=0.3), "idle time teaches nothing"
    assert pace.seconds(0, 150.0) == 0.0
