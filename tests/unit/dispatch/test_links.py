"""When a lost link may be tried again, and by how many."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.config.times import Times
from pdserve.core.cluster import EngineKey
from pdserve.dispatch.links import LostLinks
from tests.clocks import ManualClock

P0, P1, D0, D1 = ("p0", 1), ("p1", 1), ("d0", 1), ("d1", 1)
LINK = (P0, D0)
TIMES = Times(link_backoff=1.0, link_backoff_max=4.0)


def avoided(links: LostLinks, target: EngineKey) -> frozenset[EngineKey]:
    return links.avoided().get(target, frozenset())


async def test_a_lost_link_is_avoided_and_no_other() -> None:
    links = LostLinks(TIMES, ManualClock())
    assert links.lost(LINK)
    assert not links.lost(LINK), "the second request that says so brings no news"
    assert avoided(links, D0) == {P0}
    assert not avoided(links, D1)


async def test_one_request_at_a_time_tries_it_ever_more_rarely() -> None:
    clock = ManualClock()
    links = LostLinks(TIMES, clock)
    links.lost(LINK)
    waited = []
    for _ in range(4):
        begun = clock.monotonic()
        while avoided(links, D0):
            await clock.advance(0.25)
        waited.append(clock.monotonic() - begun)
        links.tried(LINK)
        assert avoided(links, D0) == {P0}, "the others wait for the outcome"
        links.lost(LINK)
    assert waited == [1.0, 2.0, 4.0, 4.0]


async def test_a_fetch_over_it_clears_it_and_the_next_loss_begins_anew() -> None:
    clock = ManualClock()
    links = LostLinks(TIMES, clock)
    links.lost(LINK)
    await clock.advance(1.0)
    links.tried(LINK)
    assert links.works(LINK)
    assert not links.works(LINK)
    assert avoided(links, D0) == frozenset()
    assert links.lost(LINK)
    assert links.next_try() == clock.monotonic() + 1.0


async def test_the_first_back_off_may_be_a_longer_one() -> None:
    links = LostLinks(TIMES, ManualClock())
    assert links.lost(LINK, 3.0)
    assert not links.lost(LINK, 9.0)
    assert links.next_try() == 1003.0


async def test_links_of_an_incarnation_that_left_are_forgotten() -> None:
    links = LostLinks(TIMES, ManualClock())
    links.lost(LINK)
    links.lost((P1, D0))
    links.keep([P1, D0, D1])
    assert avoided(links, D0) == {P1}


@given(st.lists(st.sampled_from(["lost", "tried", "works", "wait"]), max_size=30))
async def test_it_is_never_avoided_longer_than_the_longest_back_off(steps: list[str]) -> None:
    clock = ManualClock()
    links = LostLinks(TIMES, clock)
    for step in steps:
        if step == "wait":
            await clock.advance(0.7)
        else:
            getattr(links, step)(LINK)
        until = links.next_try()
        assert (until is not None) == bool(avoided(links, D0))
        assert until is None or until <= clock.monotonic() + TIMES.link_backoff_max
