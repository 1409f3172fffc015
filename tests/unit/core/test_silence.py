"""Whose silence counts, and for how long."""

from pdserve.core.silence import Silence
from tests.clocks import ManualClock

EVERY = 0.5


def looks(silence: Silence, clock: ManualClock, seconds: float) -> float:
    """What is found after so long of looking as often as one should."""
    found = 0.0
    for _ in range(round(seconds / EVERY)):
        clock.jump(EVERY)
        found = silence.look()
    return found


def test_silence_is_counted_from_the_last_word() -> None:
    clock = ManualClock()
    silence = Silence(clock, EVERY)
    assert looks(silence, clock, 2.0) == 2.0
    silence.heard()
    assert looks(silence, clock, 1.5) == 1.5


def test_nobody_is_silent_while_the_listener_stands_still() -> None:
    clock = ManualClock()
    silence = Silence(clock, EVERY)
    looks(silence, clock, 1.0)
    clock.jump(60.0)
    assert silence.look() == 1.5
    assert looks(silence, clock, 2.0) == 3.5


def test_what_is_heard_after_standing_still_is_not_of_the_future() -> None:
    clock = ManualClock()
    silence = Silence(clock, EVERY)
    clock.jump(60.0)
    silence.heard()
    assert silence.look() == 0.0
    assert looks(silence, clock, 1.0) == 1.0
