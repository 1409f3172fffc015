"""Decisions, one table row or one story each: what is measured, and what is done about it."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.endpoint import Role
from pdserve.scaler.controller import Now, Outcome, decide
from pdserve.scaler.decision import FlipRole, Replicas, Scale, SetBypass, Speed
from pdserve.scaler.demand import Demand
from pdserve.scaler.memory import Memory
from pdserve.scaler.policy import Policy
from tests.unit.scaler.policies import demand, facts, first, policy, prompts

MONDAY = datetime(2026, 11, 30, 12, 0, tzinfo=UTC).timestamp()


class Story:
    """A policy that decides again and again over pools that do at once what they are told."""

    def __init__(self, policy: Policy, prefill: int = 2, decode: int = 2, unix: float = MONDAY) -> None:
        self.policy = policy
        self.memory = Memory(busy_at=0.0)
        self.counts = {Role.PREFILL: prefill, Role.DECODE: decode}
        self.warming: Mapping[Role, int] = {}
        self.now = 0.0
        self.unix = unix

    def look(self, demand: Demand) -> Outcome:
        self.now += demand.seconds
        cloud = {
            role: Replicas(wanted=count, ready=count - self.warming.get(role, 0), warming=self.warming.get(role, 0))
            for role, count in self.counts.items()
        }
        moment = Now(monotonic=self.now, unix=self.unix + self.now)
        outcome = decide(self.policy, self.memory, demand, cloud, moment)
        self.memory = outcome.memory
        for decision in outcome.decisions:
            match decision.action:
                case Scale(role=role, engines=engines):
                    self.counts[role] = engines
                case FlipRole(role=role):
                    self.counts[role] += 1
                    self.counts[Role.DECODE if role is Role.PREFILL else Role.PREFILL] -= 1
        return outcome

    def looks(self, count: int, demand: Demand) -> list[Outcome]:
        return [self.look(demand) for _ in range(count)]


@pytest.mark.parametrize(
    ("measured", "prefill", "decode", "rule"),
    [
        ({"backlog": 1.5}, 3, 2, "backlog"),
        ({"backlog": 90.0}, 4, 2, "backlog"),
        ({"held": 12, "backlog": 0.7}, 3, 2, "queue"),
        ({"first_tokens": (first(2.4),) * 20, "backlog": 0.7, "kv": 0.6}, 4, 2, "ttft"),
        ({"kv": 0.96, "backlog": 0.7}, 2, 3, "kv_occupancy"),
        ({"tpots": (0.2,) * 20, "backlog": 0.7}, 2, 4, "tpot"),
        ({"handoff_gaps": (0.5,) * 20, "backlog": 0.7}, 2, 3, "handoff_gap"),
    ],
)
def test_each_signal_raises_its_own_pool(measured: dict[str, Any], prefill: int, decode: int, rule: str) -> None:
    story = Story(policy(), prefill=2, decode=2)
    measured = {"kv": 0.6, **measured}
    outcome = story.look(demand(**measured))
    assert (story.counts[Role.PREFILL], story.counts[Role.DECODE]) == (prefill, decode)
    assert [decision.rule for decision in outcome.decisions] == [rule]


@pytest.mark.parametrize(("fetching", "engines"), [(0, 3), (2, 2), (6, 2)])
def test_answers_whose_prompts_are_not_computed_yet_do_not_lack_an_engine_to_decode(
    fetching: int, engines: int
) -> None:
    busy = tuple(facts(Role.DECODE, n, kv_reserved=6000, waiting=6, fetching=fetching) for n in (0, 1))
    prefills = tuple(facts(Role.PREFILL, n, backlog_seconds=0.7) for n in range(2))
    story = Story(policy(), prefill=2, decode=2)
    story.look(Demand(seconds=5.0, engines=(*prefills, *busy)))
    assert story.counts[Role.DECODE] == engines


def test_within_the_dead_band_nothing_changes() -> None:
    story = Story(policy())
    for backlog, kv in ((0.7, 0.6), (0.95, 0.75), (0.65, 0.5)):
        assert not story.look(demand(backlog=backlog, kv=kv)).decisions


def test_what_is_calm_shrinks_by_half_at_most_and_not_below_min() -> None:
    story = Story(policy(prefill={"min": 3}), prefill=16, decode=6)
    assert [Scale(role=Role.PREFILL, engines=8, before=16)] == [
        replace(each.action, victims=())
        for each in story.look(demand(prefill=16, decode=6, kv=0.6)).decisions
        if isinstance(each.action, Scale)
    ]
    story.looks(4, demand(prefill=4, decode=6, kv=0.6))
    assert story.counts[Role.PREFILL] == 3


def test_those_leave_that_have_least_to_do_and_of_these_the_ones_whose_caches_hold_least() -> None:
    busy = {0: (0, 90.0), 1: (0, 20.0), 2: (3, 5.0), 3: (0, 50.0)}
    engines = [facts(Role.PREFILL, n, running=rows, busy_seconds=worked) for n, (rows, worked) in busy.items()]
    measured = replace(demand(prefill=0, kv=0.6), engines=(*engines, *demand(prefill=0, kv=0.6).engines))
    (decision,) = Story(policy(), prefill=4).look(measured).decisions
    assert decision.action == Scale(
        role=Role.PREFILL, engines=2, before=4, victims=("prefill-1", "prefill-3", "prefill-0", "prefill-2")
    )


def test_engines_that_are_starting_count_as_there() -> None:
    story = Story(policy(), prefill=4)
    story.warming = {Role.PREFILL: 2}
    assert not story.look(demand(backlog=1.9, kv=0.6)).decisions
    story.warming = {}
    assert story.look(demand(backlog=1.9, kv=0.6)).decisions


def test_a_prompt_that_is_long_by_itself_is_no_reason_for_more_engines() -> None:
    story = Story(policy())
    giants = (first(9.0, own=8.5),) * 20
    assert not story.look(demand(first_tokens=giants, backlog=0.7, kv=0.6)).decisions


def test_the_forecast_raises_the_floor_before_any_signal_does() -> None:
    forecast = {"kind": "last", "bin": 5.0, "margin": 0.0}
    story = Story(policy(prefill={"forecast": forecast, "warm_up": 10.0}), prefill=1)
    outcome = story.looks(6, demand(prefill=1, arrivals=20, prompts=prompts(20, 0.5), kv=0.6))[-1]
    assert story.counts[Role.PREFILL] >= 3  # 4 requests/s of 0.5 s each keep two engines busy
    needs = {each.role: each.need for each in outcome.assessments}
    assert needs[Role.PREFILL] == story.counts[Role.PREFILL]


def test_steps_cooldowns_and_windows_hold_a_pool_back_and_say_so() -> None:
    busy, calm = demand(backlog=5.0, kv=0.6), demand(kv=0.6)
    story = Story(policy(prefill={"up": {"step": 1, "cooldown": 20.0}, "down": {"window": 30.0, "cooldown": 0.0}}))
    counts, held = [], []
    for measured in (busy, busy, busy, busy, busy, calm, calm, calm, calm, calm, calm, calm, calm):
        outcome = story.look(measured)
        counts.append(story.counts[Role.PREFILL])
        held.append(outcome.held.get(Role.PREFILL, ""))
    assert counts == [3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 2, 2, 2]
    assert held == ["step", *["cooldown"] * 3, "step", *["stabilisation"] * 5, "", "stabilisation", "stabilisation"]


def test_a_pool_does_not_shrink_before_a_whole_window_was_seen() -> None:
    story = Story(policy(prefill={"down": {"window": 60.0}}), prefill=8)
    outcomes = story.looks(11, demand(prefill=8, kv=0.6))
    assert all(not outcome.decisions for outcome in outcomes)
    assert story.looks(2, demand(prefill=8, kv=0.6))[-1].decisions


def test_a_schedule_sets_other_bounds_in_its_hours() -> None:
    hours = [{"start": "12:00", "end": "12:01", "min": 6}, {"start": "22:00", "end": "06:00", "max": 1}]
    scheduled = policy(prefill={"schedules": hours})
    calm = demand(kv=0.6)
    noon = Story(scheduled)
    assert [each.rule for each in noon.look(calm).decisions] == ["schedule"]
    assert noon.counts[Role.PREFILL] == 6
    night = Story(scheduled, unix=MONDAY + 16 * 3600)  # four in the morning belongs to the night before
    night.look(demand(backlog=50.0, kv=0.6))
    assert night.counts[Role.PREFILL] == 1
    later = Story(scheduled, unix=MONDAY + 19 * 3600)
    later.look(demand(backlog=50.0, kv=0.6))
    assert later.counts[Role.PREFILL] == 4


def test_what_sleeps_wakes_with_the_first_request_and_what_is_idle_sleeps() -> None:
    sleepy = policy(prefill={"min": 0}, decode={"min": 0}, scale_to_zero={"idle": 20.0})
    story = Story(sleepy)
    outcomes = story.looks(4, demand())
    assert story.counts == {Role.PREFILL: 0, Role.DECODE: 0}
    assert {each.rule for each in outcomes[-1].decisions} == {"sleep"}
    assert not story.look(demand(prefill=0, decode=0)).decisions
    woken = story.look(demand(prefill=0, decode=0, arrivals=1, held=1, knocking=1))
    assert {each.rule for each in woken.decisions} == {"wake"}
    assert story.counts == {Role.PREFILL: 1, Role.DECODE: 1}


def test_what_is_idle_sleeps_whatever_paces_it() -> None:
    pool = {"min": 0, "down": {"window": 300.0, "cooldown": 300.0, "step": 1}}
    story = Story(policy(prefill=pool, decode=pool, scale_to_zero={"idle": 20.0}), prefill=3)
    story.looks(3, demand(prefill=3))
    assert story.counts == {Role.PREFILL: 3, Role.DECODE: 2}
    story.look(demand(prefill=3))
    assert story.counts == {Role.PREFILL: 0, Role.DECODE: 0}


def test_what_runs_for_long_is_no_idleness() -> None:
    story = Story(policy(prefill={"min": 0}, decode={"min": 0}, scale_to_zero={"idle": 20.0}))
    story.looks(10, demand(running=1, kv=0.1))
    assert story.counts[Role.DECODE] == 1


def test_a_total_is_shared_in_the_ratio_of_what_pools_need() -> None:
    forecast = {"kind": "last", "bin": 5.0, "margin": 0.0}
    both = {"forecast": forecast, "max": 64}
    story = Story(policy(prefill=both, decode=both, total=12), prefill=6, decode=6)
    busy = demand(
        prefill=6, decode=6, arrivals=100, prompts=prompts(100, 0.6), ended=100, output_tokens=10_000, kv=0.6,
        context_tokens=100_000,
    )  # fmt: skip
    outcome = story.looks(4, busy)[-1]
    assert sum(story.counts.values()) == 12
    needs = {each.role: each.need for each in outcome.assessments}
    assert needs[Role.PREFILL] > needs[Role.DECODE] > 0
    for role, count in story.counts.items():
        assert count == pytest.approx(12 * needs[role] / sum(needs.values()), abs=1)


def test_a_cost_ceiling_is_never_exceeded() -> None:
    story = Story(policy(prefill={"cost": 3.0}, decode={"cost": 1.0}, cost_ceiling=12.0))
    for _ in range(4):
        outcome = story.look(demand(backlog=9.0, kv=0.99))
    assert 3.0 * story.counts[Role.PREFILL] + story.counts[Role.DECODE] <= 12.0
    assert story.counts[Role.PREFILL] >= 1
    assert not outcome.decisions


FLIPS = {"flip": {"enabled": True, "cooldown": 10.0, "spare_for": 10.0}}


def test_a_spare_engine_changes_its_role_before_another_is_started() -> None:
    story = Story(policy(decode={"down": {"window": 600.0}}, **FLIPS), prefill=2, decode=6)
    story.looks(3, demand(decode=6, backlog=0.7))
    outcome = story.look(demand(decode=6, backlog=1.5))
    assert [each.action for each in outcome.decisions] == [FlipRole(engine_id="decode-0", role=Role.PREFILL)]
    assert story.counts == {Role.PREFILL: 3, Role.DECODE: 5}
    assert outcome.decisions[0].inputs["backlog_ratio"] == 1.5


def test_without_a_spare_engine_the_pool_is_scaled_and_the_decision_says_why() -> None:
    story = Story(policy(**FLIPS))
    outcome = story.look(demand(backlog=1.5, kv=0.6))
    assert [each.speed for each in outcome.decisions] == [Speed.SCALE]
    assert any(each.speed is Speed.FLIP and "none to spare" in each.why for each in outcome.decisions[0].alternatives)


def test_the_least_busy_engine_flips() -> None:
    story = Story(policy(decode={"down": {"window": 600.0}}, **FLIPS), prefill=1, decode=3)
    engines = [facts(Role.PREFILL, 0, backlog_seconds=0.7)]
    engines += [facts(Role.DECODE, n, running=running) for n, running in enumerate((4, 1, 6))]
    quiet = Demand(seconds=5.0, engines=tuple(engines))
    busy = replace(quiet, engines=(replace(engines[0], backlog_seconds=1.5), *engines[1:]))
    story.looks(3, quiet)
    flips = [each.action for each in story.look(busy).decisions if isinstance(each.action, FlipRole)]
    assert flips == [FlipRole(engine_id="decode-1", role=Role.PREFILL)]


BYPASS = {"bypass": {"enabled": True, "max_tokens": 512}}


def test_short_prompts_bypass_prefill_while_it_is_short_and_decode_is_not() -> None:
    forecast = {"kind": "last", "bin": 5.0, "margin": 0.0, "recover": 1000.0}
    story = Story(policy(prefill={"forecast": forecast, "warm_up": 5.0, "max": 2}, **BYPASS))
    short, long = prompts(40, 0.1, tokens=256)[0], prompts(8, 1.0, tokens=8192)[0]
    busy = demand(arrivals=48, prompts=(short, long), backlog=1.5)
    outcome = story.look(busy)
    assert outcome.decisions[0].action == SetBypass(below=256, before=0)
    assert not story.look(busy).decisions  # it is so already
    relieved = story.looks(2, demand(arrivals=1, prompts=prompts(1, 0.1), backlog=0.1, seconds=30.0))
    assert SetBypass(below=0, before=256) in [each.action for outcome in relieved for each in outcome.decisions]


def test_a_prompt_that_would_hold_up_tokens_for_longer_than_their_objective_is_not_bypassed() -> None:
    forecast = {"kind": "last", "bin": 5.0, "margin": 0.0, "recover": 1000.0}
    story = Story(policy(prefill={"forecast": forecast, "warm_up": 5.0, "max": 2}, **BYPASS))
    quick, slow = prompts(4, 0.05, tokens=128)[0], prompts(40, 1.5, tokens=256)[0]
    outcome = story.look(demand(arrivals=40, prompts=(slow,), backlog=1.5))
    assert not any(isinstance(each.action, SetBypass) for each in outcome.decisions)
    outcome = story.look(demand(arrivals=44, prompts=(quick, slow), backlog=1.5))
    assert SetBypass(below=128, before=0) in [each.action for each in outcome.decisions]


def test_decode_that_is_busy_itself_takes_no_prompts() -> None:
    story = Story(policy(**BYPASS))
    outcome = story.look(demand(backlog=1.5, kv=0.7, prompts=prompts(40, 0.1, tokens=256), arrivals=40))
    assert not any(isinstance(each.action, SetBypass) for each in outcome.decisions)
    assert any("of its own target" in each.why for each in outcome.decisions[0].alternatives)


def test_decisions_hold_what_they_rest_on() -> None:
    outcome = Story(policy()).look(demand(backlog=1.5, kv=0.6))
    decision = outcome.decisions[0]
    assert decision.at == MONDAY + 5.0
    assert decision.inputs["backlog_ratio"] == 1.5
    assert "3 engines are right by backlog" in decision.reason
    assert {each.speed for each in decision.alternatives} == {Speed.FLIP}


def test_without_a_report_of_engines_pools_stay() -> None:
    """A gateway that knows no engine yet has no signal: what is there is not taken for idle at once."""
    story = Story(policy(prefill={"down": {"window": 30.0}}, decode={"down": {"window": 30.0}}), 4, 4)
    assert not any(outcome.decisions for outcome in story.looks(4, demand(prefill=0, decode=0)))


def test_a_budget_counts_engines_that_stay_a_while_though_they_are_too_many() -> None:
    """Decode may not shrink yet, so prefill may not grow into its place, but a flip may."""
    slow = {"down": {"window": 600.0}}
    for flips, prefill, decode in ((False, 4, 8), (True, 8, 4)):
        flip = {"enabled": flips, "spare_for": 0.0}
        story = Story(policy(decode=slow, total=12, flip=flip), prefill=4, decode=8)
        story.look(demand(prefill=4, decode=8, backlog=9.0))
        assert (story.counts[Role.PREFILL], story.counts[Role.DECODE]) == (prefill, decode)


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 1), st.integers(0, 200), st.floats(0.001, 3)), min_size=1, max_size=12
    ),
    st.integers(1, 4),
    st.integers(4, 20),
    st.booleans(),
)
def test_pools_stay_within_their_bounds_whatever_is_measured(
    looks: list[tuple[float, float, int, float]], least: int, most: int, flips: bool
) -> None:
    both = {"min": least, "max": most, "forecast": {"kind": "holt_winters"}}
    flip = {"enabled": flips, "cooldown": 0.0, "spare_for": 0.0}
    story = Story(policy(prefill=both, decode=both, total=most + least, flip=flip, **BYPASS), least, least)
    for backlog, kv, arrivals, work in looks:
        counts = story.counts
        story.look(
            demand(
                counts[Role.PREFILL], counts[Role.DECODE], backlog=backlog, kv=kv, arrivals=arrivals,
                prompts=prompts(arrivals, work), ended=arrivals, output_tokens=100 * arrivals,
                context_tokens=1000 * arrivals,
            )
        )  # fmt: skip
        assert all(least <= count <= most for count in story.counts.values())
        assert sum(story.counts.values()) <= most + least
