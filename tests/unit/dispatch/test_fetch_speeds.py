"""What gateways learn of fetches."""

import pytest

from pdserve.core.cluster import FETCH_SECONDS
from pdserve.dispatch.fetch_speeds import FORGOTTEN, FetchSpeeds
from tests.clocks import ManualClock

D, P, Q = ("d0", 1), ("p0", 1), ("p1", 1)


def test_a_fetch_tells_the_speed_of_its_link_and_for_want_of_better_of_the_way_back() -> None:
    speeds = FetchSpeeds(ManualClock())
    speeds.fetched((D, P), 1000, FETCH_SECONDS + 0.1)
    assert speeds.to(P) == {D: pytest.approx(1e-4)}
    assert speeds.to(D) == {P: pytest.approx(1e-4)}
    assert speeds.to(Q) == {}
    speeds.fetched((P, D), 1000, FETCH_SECONDS + 0.3)
    assert speeds.to(D) == {P: pytest.approx(3e-4)}
    assert speeds.to(P) == {D: pytest.approx(1e-4)}


def test_one_slow_fetch_does_not_decide_alone() -> None:
    speeds = FetchSpeeds(ManualClock())
    speeds.fetched((D, P), 1000, FETCH_SECONDS + 0.1)
    speeds.fetched((D, P), 1000, FETCH_SECONDS + 0.5)
    assert speeds.to(P)[D] == pytest.approx(2e-4)


def test_small_fetches_are_never_free() -> None:
    speeds = FetchSpeeds(ManualClock())
    speeds.fetched((D, P), 16, FETCH_SECONDS / 2)
    assert speeds.to(P)[D] > 0


async def test_what_was_slow_once_gets_another_chance_and_who_has_left_is_forgotten() -> None:
    clock = ManualClock()
    speeds = FetchSpeeds(clock)
    speeds.fetched((D, P), 1000, 10.0)
    speeds.keep([D])
    assert speeds.to(P) == {}
    speeds.fetched((D, P), 1000, 10.0)
    await clock.advance(FORGOTTEN)
    assert speeds.to(P) == {}
