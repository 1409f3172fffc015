"""Views are made anew when something was heard of an engine, and now and then."""

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.dispatch.views import Views

ENDPOINTS = tuple(
    Endpoint(engine_id=name, role=Role.PREFILL, epoch=1, address="", pid=1, state=EngineState.READY) for name in "abc"
)


class Looks:
    """Makes a view at every look, and remembers at whom it looked."""

    def __init__(self) -> None:
        self.seen = ""

    def __call__(self, endpoint: Endpoint, now: float) -> EngineView:
        self.seen += endpoint.engine_id
        return EngineView(endpoint=endpoint, load=None, load_at=now)


def test_only_what_has_changed_is_looked_at() -> None:
    looks = Looks()
    views = Views(looks)
    views.follow(ENDPOINTS)
    first = views.at(10.0)
    views.outdate([("b", 1), ("b", 2), ("z", 1)])
    second = views.at(10.1)
    assert looks.seen == "abcb"
    assert [view.load_at for view in second] == [10.0, 10.1, 10.0]
    assert second[0] is first[0]
    assert views.at(10.2) is second


def test_each_is_looked_at_once_a_second_one_after_the_other() -> None:
    looks = Looks()
    views = Views(looks)
    views.follow(ENDPOINTS)
    views.at(10.0)
    for tick in range(1, 21):
        views.at(10.0 + tick / 10)
    assert looks.seen[:8] == "abcabcab"
    assert len(looks.seen) >= 7


def test_all_are_looked_at_after_a_change_of_all_and_after_a_second() -> None:
    looks = Looks()
    views = Views(looks)
    views.follow(ENDPOINTS[:1])
    assert [view.load_at for view in views.at(10.0)] == [10.0]
    views.outdate_all()
    assert [view.load_at for view in views.at(10.1)] == [10.1]
    assert [view.load_at for view in views.at(11.2)] == [11.2]
    views.follow(ENDPOINTS[1:])
    assert [view.endpoint for view in views.at(11.3)] == list(ENDPOINTS[1:])
