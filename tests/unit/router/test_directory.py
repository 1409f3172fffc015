"""The directory shows every state as it is, whatever it was shown before."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import Role
from pdserve.router.directory import Directory, naming
from tests.unit.router.views import cluster, view


def _view(engine_id: str, epoch: int, running: int, revision: str | None) -> EngineView:
    made = view(engine_id, Role.PREFILL, epoch=epoch, running=running)
    assert made.capacity
    return replace(made, capacity=replace(made.capacity, model_revision=revision) if revision else None)


Views = st.lists(
    st.builds(_view, st.sampled_from("abc"), st.integers(1, 2), st.integers(0, 2), st.sampled_from(["r1", "r2", None])),
    max_size=4,
    unique_by=lambda view: view.key,
)


@given(st.lists(Views, max_size=6))
def test_it_knows_the_engines_of_the_last_state(states: list[list[EngineView]]) -> None:
    directory = Directory()
    for views in states:
        directory.follow(cluster(*views))
        for name in "abc":
            for epoch in (1, 2):
                expected = next((view for view in views if view.key == (name, epoch)), None)
                assert directory.find((name, epoch)) is expected
        assert directory.namings.keys() == {naming(view.capacity) for view in views if view.capacity}
