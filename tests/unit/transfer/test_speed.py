"""Which backend is used first, given what was measured."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.transfer.speed import LARGE_BYTES, PREFERENCE_MARGIN, SMALL_BYTES, LinkSpeed, by_preference

SECONDS = st.floats(1e-6, 10)
SPEEDS = st.builds(LinkSpeed, st.floats(0, 1), st.floats(1e3, 1e12))


def taking(*seconds: float | None) -> tuple[LinkSpeed | None, ...]:
    """Speeds at which LARGE_BYTES take so long."""
    return tuple(None if s is None else LinkSpeed(0.0, LARGE_BYTES / s) for s in seconds)


def test_close_speeds_leave_the_choice_to_the_operator() -> None:
    assert by_preference(taking(1.19, 1.0)) == (0, 1)
    assert by_preference(taking(1.21, 1.0)) == (1, 0)
    assert by_preference(taking(5.0, 1.1, 3.0, 1.0)) == (1, 3, 2, 0)


def test_a_backend_nobody_could_measure_comes_after_those_that_work() -> None:
    assert by_preference(taking(None, 9.0)) == (1, 0)
    assert by_preference(taking(None, None, None)) == (0, 1, 2)
    assert by_preference(()) == ()


@given(st.lists(st.none() | SPEEDS, max_size=6))
def test_every_backend_has_one_place_and_the_first_is_close_to_the_fastest(speeds: list[LinkSpeed | None]) -> None:
    order = by_preference(tuple(speeds))
    assert sorted(order) == list(range(len(speeds)))
    measured = [speed.seconds(LARGE_BYTES) for speed in speeds if speed is not None]
    if measured:
        first = speeds[order[0]]
        assert first is not None
        assert first.seconds(LARGE_BYTES) <= min(measured) * (1 + PREFERENCE_MARGIN) * (1 + 1e-9)


@given(small=SECONDS, large=SECONDS)
def test_a_measured_speed_gives_back_what_was_measured(small: float, large: float) -> None:
    speed = LinkSpeed.measured(small, large)
    assert speed.overhead >= 0
    assert speed.rate > 0
    if large > small * LARGE_BYTES / SMALL_BYTES or large < small:
        return  # noise: no line with positive overhead and rate goes through both
    assert abs(speed.seconds(SMALL_BYTES) - small) < 2e-6 + small * 1e-3
    assert abs(speed.seconds(LARGE_BYTES) - large) < 2e-6 + large * 1e-3
