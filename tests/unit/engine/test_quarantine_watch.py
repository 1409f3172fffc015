"""Only quarantine that is large and lasts counts."""

import pytest

from pdserve.core.endpoint import BlockCounts
from pdserve.engine.quarantine_watch import QuarantineWatch


def counts(quarantined: int, total: int = 100) -> BlockCounts:
    return BlockCounts(total=total, free=total - quarantined, used=0, leased=0, quarantined=quarantined)


def verdicts(*looks: tuple[float, int], limit: float = 0.1) -> list[bool]:
    """What the watch says at these (time, quarantined of 100) in turn."""
    watch = QuarantineWatch(limit=limit, patience=10.0)
    return [watch.look(counts(quarantined), now) for now, quarantined in looks]


def test_above_the_limit_for_long_enough() -> None:
    assert verdicts((0, 11), (9.9, 11), (10.0, 40), (11, 11)) == [False, False, True, True]


def test_at_the_limit_it_waits_for_ever() -> None:
    assert verdicts((0, 10), (1000, 10)) == [False, False]


def test_a_moment_below_starts_the_wait_again() -> None:
    assert verdicts((0, 50), (9, 10), (9.5, 50), (19, 50), (19.5, 50)) == [False, False, False, False, True]


@pytest.mark.parametrize("quarantined", [50, 100])
def test_a_limit_of_one_never_restarts(quarantined: int) -> None:
    assert not any(verdicts((0, quarantined), (1000, quarantined), limit=1.0))
