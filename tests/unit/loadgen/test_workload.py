"""Plans: arrivals, lengths and limits are what was asked for, and the same for the same seed."""

import gzip
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve_loadgen.arrivals import Arrivals, arrival_times
from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.lengths import Constant, Empirical, Lognormal, Uniform, parse_lengths
from pdserve_loadgen.workload import Limits, PlannedRequest, Synthetic, limited


@given(st.sampled_from(Arrivals), st.floats(0.1, 1000), st.integers())
def test_arrivals_ascend_from_zero_and_repeat_with_their_seed(kind: Arrivals, rate: float, seed: int) -> None:
    times = list(islice(arrival_times(kind, rate, Random(seed)), 50))
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == list(islice(arrival_times(kind, rate, Random(seed)), 50))


def test_constant_arrivals_keep_their_distance_without_drift() -> None:
    times = list(islice(arrival_times(Arrivals.CONSTANT, 10, Random(0)), 10_001))
    assert times[-1] == 1000.0


def test_poisson_gaps_are_exponential() -> None:
    gaps = [b - a for a, b in pairwise(islice(arrival_times(Arrivals.POISSON, 4, Random(1)), 20_001))]
    assert mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.06)
    assert median(gaps) == pytest.approx(0.25 * 0.6931, rel=0.04)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", Constant(512)),
        ("constant:7", Constant(7)),
        ("uniform:3:9", Uniform(3, 9)),
        ("lognormal:500:0.8", Lognormal(500.0, 0.8)),
        ("lognormal:500:0.8:4000", Lognormal(500.0, 0.8, 4000)),
    ],
)
def test_spelled_lengths_mean_their_distribution(text: str, lengths: object) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "x", "uniform:9:3", "uniform:3", "lognormal:0:1", "lognormal:5", "lognormal:5:-1", "zipf:2"]
)
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="lengths"):
        parse_lengths(text)


def test_draws_have_the_shape_they_promise() -> None:
    rng = Random(5)
    uniform = [Uniform(3, 9).draw(rng) for _ in range(500)]
    assert set(uniform) == set(range(3, 10))
    lognormal = [Lognormal(500, 0.8, 4000).draw(rng) for _ in range(4000)]
    assert median(lognormal) == pytest.approx(500, rel=0.05)
    assert max(lognormal) == 4000
    assert min(Lognormal(1, 3).draw(rng) for _ in range(500)) == 1


@pytest.mark.parametrize("name", ["lengths.csv", "lengths.csv.gz"])
def test_empirical_lengths_come_from_a_column(tmp_path: Path, name: str) -> None:
    text = b"in,out\n10,1\n20,2\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert parse_lengths(f"empirical:{tmp_path / name}:in") == Empirical((10, 20))
    assert Empirical((10, 20)).draw(Random(0)) in (10, 20)
    with pytest.raises(UsageError, match="no column 'middle'"):
        parse_lengths(f"empirical:{tmp_path / name}:middle")
    with pytest.raises(UsageError, match="cannot read"):
        parse_lengths(f"empirical:{tmp_path / 'absent.csv'}:in")


def plan(seed: int = 0, limits: Limits | None = None, **fields: Any) -> list[PlannedRequest]:
    given: dict[str, Any] = {"input": Uniform(10, 100), "output": Uniform(1, 50), "rate": 5.0} | fields
    synthetic = Synthetic(**given)
    return list(limited(synthetic.plan(seed), limits or Limits(requests=200), seed))


def test_a_plan_repeats_with_its_seed_and_only_with_it() -> None:
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


def test_another_rate_leaves_the_lengths_as_they_are() -> None:
    def lengths(rate: float) -> list[tuple[int, int]]:
        return [(planned.input_tokens, planned.output_tokens) for planned in plan(rate=rate)]

    assert lengths(5.0) == lengths(50.0)


def test_a_duration_ends_the_arrivals() -> None:
    timed = plan(limits=Limits(duration=10.0), arrivals=Arrivals.CONSTANT)
    assert len(timed) == 50
    assert timed[-1].at < 10.0


def test_warm_up_comes_first_on_top_of_the_measured_and_is_not_cancelled() -> None:
    warmed = plan(limits=Limits(requests=20, warmup=5, cancel_fraction=1.0))
    assert [planned.warmup for planned in warmed] == [True] * 5 + [False] * 20
    assert [planned.cancel_after is None for planned in warmed] == [True] * 5 + [False] * 20


def test_the_share_of_cancelled_requests_is_the_one_asked_for() -> None:
    planned = plan(limits=Limits(requests=2000, cancel_fraction=0.3))
    cancelled = [p for p in planned if p.cancel_after is not None]
    assert len(cancelled) == pytest.approx(600, rel=0.1)
    assert all(p.cancel_after is not None and 0 <= p.cancel_after < p.output_tokens for p in cancelled)


def test_shared_prefixes_are_drawn_from_their_groups() -> None:
    grouped = plan(prefix_tokens=64, prefix_groups=3)
    assert {planned.prefix_ids for planned in grouped} == {(0,), (1,), (2,)}
    assert all(planned.input_tokens >= 64 and planned.block_tokens == 64 for planned in grouped)
