"""What a report says of engines."""

import pytest

from pdserve.core.endpoint import BlockCounts, Role
from pdserve.simulator.report import EngineUse, imbalance_of


def use(engine_id: str, role: Role, uncached_tokens: int) -> EngineUse:
    return EngineUse(
        engine_id=engine_id,
        role=role,
        alive=True,
        steps=1,
        tokens=1,
        utilisation=0.5,
        uncached_tokens=uncached_tokens,
        blocks=BlockCounts(total=1, free=1, used=0, leased=0, quarantined=0),
    )


def test_imbalance_is_most_over_mean_of_the_engines_that_compute_prompts() -> None:
    prefills = [use("p0", Role.PREFILL, 30), use("p1", Role.PREFILL, 10)]
    assert imbalance_of([*prefills, use("d0", Role.DECODE, 500)]) == pytest.approx(1.5)
    assert imbalance_of([use("u0", Role.UNIFIED, 8), use("u1", Role.UNIFIED, 8)]) == pytest.approx(1.0)


def test_incarnations_of_one_engine_count_as_one() -> None:
    engines = [use("u0", Role.UNIFIED, 5), use("u0", Role.UNIFIED, 5), use("u1", Role.UNIFIED, 10)]
    assert imbalance_of(engines) == pytest.approx(1.0)


def test_an_idle_cluster_has_no_imbalance() -> None:
    assert imbalance_of([use("u0", Role.UNIFIED, 0)]) == imbalance_of([]) == 0.0
