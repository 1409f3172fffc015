"""Percentiles by the stated rule, held to numpy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve_loadgen.percentiles import Distribution, percentile

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 100))
def test_equals_numpys_linear_percentile(values: list[float], percent: float) -> None:
    wanted = float(np.percentile(values, percent, method="linear"))
    assert percentile(sorted(values), percent) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_ranks_in_between_are_interpolated() -> None:
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([10.0, 20.0, 30.0, 40.0, 50.0], 90) == pytest.approx(46.0)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_no_values_and_no_such_percent_are_errors(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


@given(VALUES)
def test_a_distribution_orders_its_values(values: list[float]) -> None:
    summary = Distribution.of(iter(values))
    assert summary
    ordered = [summary.min, summary.p50, summary.p90, summary.p95, summary.p99, summary.max]
    assert ordered == sorted(ordered)
    assert (summary.count, summary.min, summary.max) == (len(values), min(values), max(values))
    assert summary.mean == pytest.approx(float(np.mean(values)))


def test_nothing_has_no_distribution() -> None:
    assert Distribution.of([]) is None
