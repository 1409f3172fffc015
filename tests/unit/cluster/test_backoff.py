"""Restart delays."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.backoff import deaths_in_a_row, restart_delay
from pdserve.config.times import Times

TIMES = Times(restart_backoff=0.5, restart_backoff_max=30.0, restart_forgiven=60.0)


def test_the_delay_doubles_up_to_its_maximum() -> None:
    assert [restart_delay(deaths, TIMES) for deaths in range(1, 10)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


@given(st.integers(min_value=1, max_value=10**9))
def test_any_number_of_deaths_gives_a_delay_within_bounds(deaths: int) -> None:
    assert 0.5 <= restart_delay(deaths, TIMES) <= 30.0


def test_a_process_that_lived_long_enough_starts_over() -> None:
    assert deaths_in_a_row(5, 59.9, TIMES) == 6
    assert deaths_in_a_row(5, 60.0, TIMES) == 1
