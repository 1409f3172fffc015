"""What requests are like, learned from reports of which some say more than others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.endpoint import Role
from pdserve.scaler.assess import assess
from pdserve.scaler.decision import Replicas
from pdserve.scaler.demand import Demand
from pdserve.scaler.memory import Memory, remember
from tests.unit.scaler.policies import demand, facts, policy, prompts

EVERY = 5.0


def reports(count: int, sent: float, busy: float, stands: float = 0.0) -> list[Demand]:
    """Of one prefill engine: in each, prompts of so many predicted seconds were sent, it was busy for so long, and what
    stands in its queue grew by so much."""
    return [
        Demand(
            seconds=EVERY,
            prompts=prompts(1, sent),
            engines=(facts(Role.PREFILL, 0, busy_seconds=n * busy, backlog_seconds=n * stands),),
        )
        for n in range(count)
    ]


def slowness(told: list[Demand]) -> float:
    memory = Memory(busy_at=0.0)
    for n, each in enumerate(told):
        memory = remember(memory, each, policy(), n * EVERY)
    return memory.likeness.slowness


def test_prompts_that_take_longer_than_predicted_are_slow_the_surer_the_more_were_seen() -> None:
    assert slowness(reports(1, sent=3.0, busy=4.5)) == 1.0, "how long it was busy is known between two reports alone"
    few, many = slowness(reports(5, sent=3.0, busy=4.5)), slowness(reports(200, sent=3.0, busy=4.5))
    assert 1.0 < few < 1.2 < many < 1.5
    assert slowness(reports(2000, sent=30.0, busy=300.0)) == 2.0


def test_what_piles_up_in_queues_has_not_been_computed() -> None:
    assert slowness(reports(100, sent=8.0, busy=5.0)) == 1.0
    assert slowness(reports(100, sent=8.0, busy=6.0, stands=4.0)) > 1.15


def test_engines_that_come_and_go_and_those_that_write_tokens_tell_nothing() -> None:
    told = reports(2, sent=3.0, busy=0.0)
    newcomer = facts(Role.PREFILL, 1, busy_seconds=500.0)
    writer = facts(Role.DECODE, 0, busy_seconds=500.0)
    assert slowness([told[0], Demand(seconds=EVERY, prompts=told[1].prompts, engines=(newcomer, writer))]) == 1.0
    assert slowness([told[0], demand(prefill=0, decode=0), told[1]]) == 1.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1000)), max_size=30))
def test_slowness_stays_within_bounds(seen: list[tuple[float, float, float]]) -> None:
    told, busy = list[Demand](), 0.0
    for sent, more, stands in seen:
        busy += more
        engine = facts(Role.PREFILL, 0, busy_seconds=busy, backlog_seconds=stands)
        told.append(Demand(seconds=EVERY, prompts=prompts(1, sent), engines=(engine,)))
    assert 1.0 <= slowness(told) <= 2.0


def test_a_slow_pool_needs_more_engines() -> None:
    needs = []
    for busy in (2.0, 4.0):
        memory = Memory(busy_at=0.0)
        for n in range(100):
            engines = tuple(facts(Role.PREFILL, e, busy_seconds=n * busy) for e in range(4))
            told = Demand(seconds=EVERY, arrivals=10, prompts=prompts(10, 0.8), engines=engines)
            memory = remember(memory, told, policy(), n * EVERY)
        forecasting = policy(prefill={"forecast": {"kind": "last", "margin": 0.0}})
        needs.append(assess(Role.PREFILL, forecasting, memory, Replicas(wanted=4, ready=4)).need)
    assert needs[0] < needs[1] == pytest.approx(2 * needs[0], rel=0.5)
