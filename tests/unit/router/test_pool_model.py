"""Peers count as equally fast until they certainly are not."""

from math import exp
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import StepTally
from pdserve.router.calibration import StepCalibrator
from pdserve.router.pool_model import EQUAL_WITHIN, MEMORY_SECONDS, REFRESH_SECONDS, PoolModel

TRUTH = StepModel(base=5e-3, per_token=4e-4, per_context=2e-7)
STEP = (8, 4096)


def calibrator(
    slowness: float, *, reports: int = 100, steps: int = 400, noise: float = 0.0, seed: int = 0
) -> StepCalibrator:
    """Of an engine so many times slower than TRUTH. Each of its reports tells of so many steps of each of several
    sizes."""
    rng = Random(seed)
    tallies = [StepTally() for _ in range(10)]
    learning = StepCalibrator()
    for _ in range(reports):
        for tokens, context in ((1, 300), (1, 900), (6, 4000), (60, 900), (300, 2000)):
            seconds = steps * TRUTH.seconds(tokens, context) * slowness * rng.uniform(1 - noise, 1 + noise)
            old = tallies[tokens.bit_length()]
            tallies[tokens.bit_length()] = StepTally(
                steps=old.steps + steps,
                tokens=old.tokens + steps * tokens,
                context=old.context + steps * context,
                seconds=old.seconds + seconds,
            )
        learning.update(tallies)
    return learning


def seen(pool: PoolModel[str], key: str) -> float:
    """Seconds of a step as the pool sees it, in those of TRUTH."""
    model = pool.model(key)
    assert model
    return model.seconds(*STEP) / TRUTH.seconds(*STEP)


def pool_of(*engines: StepCalibrator) -> PoolModel[str]:
    pool = PoolModel[str]()
    for number, engine in enumerate(engines):
        pool.add(f"e{number}", engine)
    pool.refresh(0.0)
    return pool


def test_nothing_is_known_before_a_step() -> None:
    assert pool_of(StepCalibrator()).model("e0") is None


def test_small_differences_are_noise_and_an_engine_without_steps_is_like_its_peers() -> None:
    pool = pool_of(calibrator(0.9), calibrator(1.1), StepCalibrator())
    assert pool.model("e0") == pool.model("e1") == pool.model("e2") == pool.model("new")
    assert seen(pool, "e0") == pytest.approx(1.0, rel=0.05)


def test_large_differences_are_kept_less_what_may_be_noise() -> None:
    pool = pool_of(calibrator(1.0), calibrator(4.0))
    assert 2.0 < seen(pool, "e1") / seen(pool, "e0") < 4.0 / exp(EQUAL_WITHIN)


@pytest.mark.parametrize("seed", range(5))
def test_few_noisy_steps_prove_nothing(seed: int) -> None:
    one, other = (calibrator(1.0, reports=1, steps=1, noise=0.5, seed=seed) for seed in (seed, seed + 99))
    pool = pool_of(one, other)
    assert pool.model("e0") == pool.model("e1")


def test_many_steps_of_one_bad_moment_prove_little() -> None:
    pool = pool_of(calibrator(1.0), calibrator(2.5, reports=2, steps=1000))
    assert pool.model("e0") == pool.model("e1")
    pool = pool_of(calibrator(1.0), calibrator(2.5, reports=20, steps=10))
    assert seen(pool, "e1") > 1.2 * seen(pool, "e0")


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 20.0), min_size=1, max_size=5))
def test_the_order_of_speeds_is_never_turned_round(factors: list[float]) -> None:
    pool = pool_of(*map(calibrator, factors))
    speeds = [seen(pool, f"e{number}") for number in range(len(factors))]
    for one, first in zip(speeds, factors, strict=True):
        for other, second in zip(speeds, factors, strict=True):
            assert first >= second or one <= other * (1 + 1e-6)


def test_all_models_change_together_once_per_refresh() -> None:
    pool = pool_of(calibrator(1.0))
    version, before = pool.version, pool.model("e0")
    pool.add("e1", calibrator(9.0))
    pool.refresh(REFRESH_SECONDS / 2)
    assert (pool.version, pool.model("e0"), pool.model("e1")) == (version, before, before)
    pool.refresh(REFRESH_SECONDS)
    assert pool.version == version + 1
    assert seen(pool, "e1") > 1.5 * seen(pool, "e0")


def test_an_engine_that_left_no_longer_counts_and_a_pool_left_empty_remembers() -> None:
    pool = pool_of(calibrator(1.0), calibrator(9.0))
    pool.forget("e1")
    pool.refresh(REFRESH_SECONDS)
    assert seen(pool, "e0") == pytest.approx(1.0, rel=0.05)
    pool.forget("e0")
    pool.refresh(2 * REFRESH_SECONDS)
    assert seen(pool, "e2") == pytest.approx(1.0, rel=0.05)


def test_an_engine_that_was_slow_gets_another_chance_when_it_has_been_idle() -> None:
    pool, fast = PoolModel[str](), calibrator(1.0)
    pool.add("fast", fast)
    pool.add("slow", calibrator(9.0))
    pool.refresh(0.0)
    assert seen(pool, "slow") > 3 * seen(pool, "fast")
    seconds = 0.0
    while seen(pool, "slow") > 1.01 * seen(pool, "fast"):
        seconds += REFRESH_SECONDS
        assert seconds < 12 * MEMORY_SECONDS
        fast.reports += 1
        pool.refresh(seconds)
    assert seen(pool, "fast") == pytest.approx(1.0, rel=0.1)


def test_a_pool_that_has_been_idle_for_days_still_knows_its_steps() -> None:
    pool = pool_of(calibrator(1.0), calibrator(1.1))
    pool.refresh(1e6)
    assert pool.model("e0") == pool.model("e1")
    assert seen(pool, "e0") == pytest.approx(1.0, rel=0.25)
