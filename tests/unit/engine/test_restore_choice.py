"""Restoring is chosen when it is predicted to be faster than computing, by what was measured."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.endpoint import StepTally
from pdserve.core.tiers import Tier, TierRead
from pdserve.engine.restore_choice import RestoreChoice, best_prefix, seconds_per_token

HOST, DISK = Tier.HOST, Tier.DISK


def measured(host: float = 0.0, disk: float = 0.0) -> RestoreChoice:
    """Seconds per block of 10 tokens."""
    choice = RestoreChoice(block_size=10)
    choice.measured([TierRead(tier=HOST, blocks=4, seconds=4 * host), TierRead(tier=DISK, blocks=2, seconds=2 * disk)])
    return choice


@given(st.lists(st.floats(-10, 10), max_size=8))
def test_no_other_prefix_saves_more(savings: list[float]) -> None:
    count = best_prefix(savings)
    best = sum(savings[:count])
    assert all(best >= sum(savings[:other]) - 1e-9 for other in range(len(savings) + 1))


def test_what_nobody_measured_is_tried() -> None:
    assert RestoreChoice(10).choose([HOST, DISK], 0.001) == 2
    assert measured(host=5.0, disk=5.0).choose([HOST, DISK], None) == 2


def test_only_the_tier_that_is_faster_than_computing_is_asked() -> None:
    assert measured(host=0.001, disk=0.5).choose([HOST, HOST, DISK], 0.01) == 2
    assert measured(host=0.001, disk=0.05).choose([HOST, HOST, DISK], 0.01) == 3


def test_a_slow_block_is_crossed_when_what_lies_behind_pays_for_it() -> None:
    assert measured(host=0.001, disk=0.15).choose([DISK, HOST, HOST], 0.01) == 3
    assert measured(host=0.001, disk=0.5).choose([DISK, HOST, HOST], 0.01) == 0


def test_a_tier_passed_over_gets_another_chance() -> None:
    choice = measured(disk=0.2)
    choices = [choice.choose([DISK], 0.01) for _ in range(30)]
    assert choices[0] == 0
    assert choices[-1] == 1


def test_while_a_restore_is_late_none_is_begun() -> None:
    choice = measured(host=0.001)
    choice.late()
    assert choice.choose([HOST], 0.01) == 0
    choice.settled()
    assert choice.choose([HOST], 0.01) == 1


def test_new_measurements_change_the_choice() -> None:
    choice = measured(host=0.001)
    for _ in range(20):
        choice.measured([TierRead(tier=HOST, blocks=1, seconds=1.0)])
    assert choice.choose([HOST], 0.01) == 0


def test_only_steps_that_computed_prompts_tell_what_a_token_costs() -> None:
    decodes = [StepTally(steps=9, tokens=9, seconds=9.0)] * 6
    assert seconds_per_token(decodes) is None
    prompts = [StepTally(), StepTally(steps=2, tokens=100, seconds=0.5)]
    assert seconds_per_token(decodes + prompts) == 0.005
