"""Step times as an engine tallies them."""

from pdserve.core.batch import Batch, Row
from pdserve.core.endpoint import StepTally
from pdserve.engine.step_timing import StepTimer
from tests.clocks import ManualClock


def batch(*rows: tuple[int, int]) -> Batch:
    """Rows of (start, tokens)."""
    return Batch(
        step=0,
        rows=tuple(
            Row(sequence_id=i, start=start, num_tokens=tokens, token_ids=(0,) * tokens, block_ids=())
            for i, (start, tokens) in enumerate(rows)
        ),
    )


async def test_a_step_behind_another_counts_from_the_end_of_that_one() -> None:
    clock = ManualClock()
    timer = StepTimer(clock)
    timer.submitted(batch((0, 5), (10, 1)))
    await clock.advance(1.0)
    timer.submitted(batch((5, 1), (11, 1)))
    await clock.advance(2.0)
    timer.completed()
    await clock.advance(0.5)
    timer.completed()
    assert timer.tallies == (
        StepTally(),
        StepTally(),
        StepTally(steps=1, tokens=2, context=18, seconds=0.5),
        StepTally(steps=1, tokens=6, context=16, seconds=3.0),
    )


async def test_idle_time_is_not_a_steps() -> None:
    clock = ManualClock()
    timer = StepTimer(clock)
    for _ in range(3):
        await clock.advance(100.0)
        timer.submitted(batch((0, 1)))
        await clock.advance(0.25)
        timer.completed()
    assert timer.tallies[1] == StepTally(steps=3, tokens=3, context=3, seconds=0.75)
