"""Forecasts against series whose future is known."""

from math import pi, sin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.scaler.forecast import forecast, kept_bins
from pdserve.scaler.policy import Forecast

RATES = st.lists(st.floats(min_value=0, max_value=1e4), min_size=1, max_size=60)


@pytest.mark.parametrize("kind", ["last", "ewma", "holt_winters"])
def test_a_steady_rate_is_expected_to_stay(kind: str) -> None:
    assert forecast([7.0] * 40, Forecast(kind=kind), 60.0) == pytest.approx(7.0)  # type: ignore[arg-type]


def test_last_is_the_latest_bin_and_an_average_lags_behind_a_step() -> None:
    rates = [2.0] * 20 + [10.0]
    assert forecast(rates, Forecast(kind="last"), 60.0) == 10.0
    averaged = forecast(rates, Forecast(kind="ewma", bin=10.0, half_life=10.0), 60.0)
    assert averaged == pytest.approx(6.0)


def test_a_trend_goes_on_but_not_for_ever() -> None:
    rates = [float(n) for n in range(40)]
    rule = Forecast(bin=10.0)
    near, far, farther = (forecast(rates, rule, horizon) for horizon in (30.0, 300.0, 3000.0))
    assert rates[-1] < near < far
    assert farther == pytest.approx(far, rel=0.05)


def test_a_season_that_was_seen_is_expected_again() -> None:
    bins = 24
    rates = [10.0 + 8.0 * sin(2 * pi * n / bins) for n in range(3 * bins)]
    rule = Forecast(bin=10.0, season=240.0, half_life=600.0, trend_half_life=6000.0)
    for ahead in range(1, bins):
        expected = 10.0 + 8.0 * sin(2 * pi * (3 * bins - 1 + ahead) / bins)
        assert forecast(rates, rule, 10.0 * ahead) == pytest.approx(expected, abs=1.5)


def test_without_a_bin_or_a_kind_nothing_is_expected() -> None:
    assert forecast([], Forecast(), 60.0) == 0.0
    assert forecast([5.0], Forecast(kind="none"), 60.0) == 0.0


@given(RATES, st.floats(min_value=0, max_value=1e5), st.sampled_from(["last", "ewma", "holt_winters"]))
def test_forecasts_are_finite_and_never_negative(rates: list[float], horizon: float, kind: str) -> None:
    expected = forecast(rates, Forecast(kind=kind, season=200.0), horizon)  # type: ignore[arg-type]
    assert 0.0 <= expected < 1e7


def test_bins_are_kept_for_two_seasons() -> None:
    assert kept_bins(Forecast(bin=10.0, season=3600.0)) == 720
