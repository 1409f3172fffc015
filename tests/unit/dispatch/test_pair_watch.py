"""When a link that works is still avoided."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.dispatch.pair_watch import DAMAGE_STREAK, LEAST_BYTES, SLOW_FACTOR, SLOW_STREAK, PairWatch

P0, P1, D0, D1 = ("p0", 1), ("p1", 1), ("d0", 1), ("d1", 1)
LINK, OTHER, THIRD = (P0, D0), (P1, D0), (P1, D1)
MB = 10 * LEAST_BYTES


def test_a_link_much_slower_than_the_others_is_slow_after_a_streak() -> None:
    watch = PairWatch()
    for other in (OTHER, THIRD):
        assert not watch.carried(other, MB, 1.0)
    said = [watch.carried(LINK, MB, SLOW_FACTOR + 1) for _ in range(SLOW_STREAK + 1)]
    assert said == [False] * (SLOW_STREAK - 1) + [True, True]
    assert not watch.carried(LINK, MB, 1.0), "one good transfer clears it"
    assert not watch.carried(LINK, MB, SLOW_FACTOR + 1)


def test_its_slowness_does_not_make_the_others_look_fast_or_slow() -> None:
    watch = PairWatch()
    for _ in range(10):
        assert not watch.carried(OTHER, MB, 1.0)
        watch.carried(LINK, MB, 100.0)
        assert not watch.carried(THIRD, MB, 2.0)


def test_a_link_to_another_domain_is_compared_with_others_that_lead_to_one() -> None:
    watch = PairWatch()
    for _ in range(SLOW_STREAK):
        assert not watch.carried(OTHER, MB, 1.0)
        assert not watch.carried(LINK, MB, 100.0, far=True)
    for _ in range(SLOW_STREAK):
        assert not watch.carried(THIRD, MB, 10.0, far=True)
    said = [watch.carried(LINK, MB, 100.0, far=True) for _ in range(SLOW_STREAK)]
    assert said[-1], "slower than its own kind"


@given(st.lists(st.floats(1e-6, 1e6), max_size=20))
def test_a_sole_link_is_never_slow(seconds: list[float]) -> None:
    watch = PairWatch()
    assert not any(watch.carried(LINK, MB, taken) for taken in seconds)


@given(st.lists(st.floats(1.0, SLOW_FACTOR * 0.99), max_size=20))
def test_links_within_the_factor_are_never_slow(seconds: list[float]) -> None:
    watch = PairWatch()
    watch.carried(OTHER, MB, 1.0)
    assert not any(watch.carried(LINK, MB, taken) for taken in seconds)


def test_small_transfers_are_not_judged() -> None:
    watch = PairWatch()
    watch.carried(OTHER, MB, 1.0)
    assert not any(watch.carried(LINK, LEAST_BYTES - 1, 1e3) for _ in range(2 * SLOW_STREAK))


def test_damage_in_a_row_is_bad_and_a_good_transfer_between_is_not() -> None:
    watch = PairWatch()
    assert [watch.damaged(LINK) for _ in range(DAMAGE_STREAK)] == [False] * (DAMAGE_STREAK - 1) + [True]
    watch.carried(LINK, 10, 0.001)
    assert not watch.damaged(LINK)
    assert not watch.damaged(OTHER)


def test_links_of_an_incarnation_that_left_are_forgotten() -> None:
    watch = PairWatch()
    watch.carried(OTHER, MB, 1.0)
    watch.damaged(LINK)
    watch.keep([P0, D0])
    assert watch.damaged(LINK)
    assert not any(watch.carried(LINK, MB, 1e3) for _ in range(2 * SLOW_STREAK)), "nothing is left to compare with"
