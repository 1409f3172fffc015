"""Progressive or bulk: the choice, its prediction, and what both are learned from."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.protocols import PullReceipt
from pdserve.engine.pull_mode import (
    EXPLORE_EVERY,
    Production,
    PullForecast,
    PullHistory,
    PullMode,
    forecast,
)
from pdserve.engine.pull_tally import PullTally
from pdserve.engine.regions import next_region
from pdserve.transfer.speed import LinkSpeed

MIB = 1 << 20
BLOCK = MIB // 4
FAST = LinkSpeed(overhead=0.0001, rate=5e9)


def simulated(num_blocks: int, link: LinkSpeed, production: Production) -> tuple[float, float]:
    """(progressive, bulk) seconds after the last block is final, by playing both through; whole regions only."""
    size = int(production.region_blocks)
    one = link.seconds(size * BLOCK)
    free_at = final_at = 0.0
    for region in range(num_blocks // size):
        final_at = (region + 1) * size * production.seconds_per_block
        free_at = max(free_at, final_at) + one
    sizes = list[int]()
    while sum(sizes) < num_blocks:
        sizes.append(next_region(BLOCK, sum(sizes), num_blocks - sum(sizes)))
    return free_at - final_at, sum(link.seconds(blocks * BLOCK) for blocks in sizes)


def test_a_link_that_outruns_production_leaves_only_the_last_region() -> None:
    predicted = forecast(32, BLOCK, FAST, Production(region_blocks=4, seconds_per_block=0.01))
    assert predicted.mode is PullMode.PROGRESSIVE
    assert predicted.progressive == pytest.approx(FAST.seconds(4 * BLOCK))


def test_many_small_pulls_of_what_comes_fast_are_better_made_at_once() -> None:
    slow_to_start = LinkSpeed(overhead=0.02, rate=5e9)
    predicted = forecast(32, BLOCK, slow_to_start, Production(region_blocks=1, seconds_per_block=0.001))
    assert predicted.mode is PullMode.BULK
    assert predicted.bulk < predicted.progressive


@given(
    regions=st.integers(1, 40),
    size=st.sampled_from([1, 2, 4, 8, 16]),
    overhead=st.floats(0, 0.1),
    rate=st.floats(1e7, 1e11),
    seconds_per_block=st.floats(0, 0.1),
)
def test_the_prediction_is_what_playing_it_through_gives(
    regions: int, size: int, overhead: float, rate: float, seconds_per_block: float
) -> None:
    link, production = LinkSpeed(overhead, rate), Production(size, seconds_per_block)
    predicted = forecast(regions * size, BLOCK, link, production)
    progressive, bulk = simulated(regions * size, link, production)
    assert predicted.progressive == pytest.approx(progressive, rel=1e-6, abs=1e-9)
    assert predicted.bulk == pytest.approx(bulk, rel=1e-6, abs=1e-9)
    assert (predicted.mode is PullMode.BULK) == (predicted.bulk < predicted.progressive * 0.9)


def learned(link: LinkSpeed, *, pulls: int = 50, noise: float = 0.0) -> PullHistory:
    history, rng = PullHistory(), random.Random(1)
    for number in range(pulls):
        num_bytes = rng.choice([1, 2, 8, 16]) * MIB
        history.pulled(num_bytes, link.seconds(num_bytes) * (1 + rng.uniform(-noise, noise)), ended_at=10.0 * number)
        history.produced(2, 0.004)
    return history


def test_a_history_finds_the_links_overhead_and_rate_and_the_pace_of_production() -> None:
    link = LinkSpeed(overhead=0.003, rate=1e9)
    found = learned(link).link()
    assert found is not None
    assert found.overhead == pytest.approx(0.003, rel=1e-6)
    assert found.rate == pytest.approx(1e9, rel=1e-6)
    production = learned(link).production()
    assert production is not None
    assert production.region_blocks == pytest.approx(2)
    assert production.seconds_per_block == pytest.approx(0.002)
    noisy = learned(link, noise=0.2).link()
    assert noisy is not None
    assert noisy.seconds(8 * MIB) == pytest.approx(link.seconds(8 * MIB), rel=0.2)


def test_pulls_that_share_the_link_do_not_make_it_look_slow() -> None:
    link, history, now = LinkSpeed(overhead=0.003, rate=1e9), PullHistory(), 0.0
    for _ in range(20):
        posted = now
        for size in (4, 4, 8, 16):
            now += link.seconds(size * MIB)
            history.pulled(size * MIB, now - posted, ended_at=now)
    found = history.link()
    assert found is not None
    assert found.seconds(8 * MIB) == pytest.approx(link.seconds(8 * MIB), rel=1e-6)


def test_nothing_is_predicted_from_too_little_or_from_pulls_of_one_size() -> None:
    assert PullHistory().decide(10, MIB) == PullForecast()
    few = learned(FAST, pulls=2)
    assert few.decide(10, MIB) == PullForecast()
    alike = PullHistory()
    for number in range(50):
        alike.pulled(MIB, 0.01, ended_at=number)
        alike.produced(1, 0.001)
    assert alike.link() is None
    assert alike.decide(10, MIB) == PullForecast()


def test_a_history_that_says_bulk_looks_again_now_and_then() -> None:
    history = learned(LinkSpeed(overhead=0.05, rate=5e9))
    modes = [history.decide(16, BLOCK).mode for _ in range(4 * EXPLORE_EVERY)]
    assert modes.count(PullMode.PROGRESSIVE) == 4
    assert modes.count(PullMode.BULK) == 4 * (EXPLORE_EVERY - 1)
    assert history.decide(0, MIB) == PullForecast(), "nothing to pull, nothing to predict"


def test_a_tally_sums_receipts_up_for_the_record() -> None:
    tally = PullTally(backend="nixl", forecast=PullForecast(PullMode.BULK, 0.4, 0.1))
    for failovers in ((), (("nixl", "transfer_failed"),)):
        tally.add(
            PullReceipt(
                backend="grpc" if failovers else "nixl",
                num_bytes=100,
                queue_seconds=0.25,
                post_seconds=0.5,
                wire_seconds=1.0,
                verify_seconds=2.0,
                failovers=failovers,
            )
        )
    fields = tally.trace()
    assert (fields["transfer_backend"], fields["transfer_bytes"], fields["transfer_pulls"]) == ("grpc", 200, 2)
    assert (fields["transfer_mode"], fields["transfer_forecast"]) == ("bulk", (("progressive", 0.4), ("bulk", 0.1)))
    assert dict(fields["transfer_stages"]) == {"queue": 0.5, "post": 1.0, "wire": 2.0, "verify": 4.0}
    assert fields["transfer_failovers"] == (("nixl", "transfer_failed"),)
    empty = PullTally().trace()
    assert (empty["transfer_backend"], empty["transfer_mode"], empty["transfer_forecast"]) == ("", "", ())
