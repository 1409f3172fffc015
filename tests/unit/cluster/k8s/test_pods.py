"""How pods count."""

import pytest

from pdserve.cluster.k8s.pods import PodState, count, engines, state_of
from pdserve.scaler.decision import Replicas
from tests.unit.cluster.k8s.api_server import Json, group, pod, starting, unschedulable


def waiting(reason: str) -> Json:
    container = {"state": {"waiting": {"reason": reason}}}
    return pod("p-0", "p", conditions=[{"type": "Ready", "status": "False"}], containerStatuses=[container])


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (pod("p-0", "p"), PodState.READY),
        (pod("p-0", "p", deleted=True), PodState.GONE),
        (pod("p-0", "p", phase="Failed"), PodState.GONE),
        (starting("p-0", "p"), PodState.WARMING),
        ({"metadata": {"name": "p-0"}}, PodState.WARMING),
        (unschedulable("p-0", "p"), PodState.LOST),
        (waiting("ContainerCreating"), PodState.WARMING),
        (waiting("ImagePullBackOff"), PodState.LOST),
        (waiting("CrashLoopBackOff"), PodState.LOST),
    ],
)
def test_a_pod_serves_warms_waits_for_nothing_or_is_gone(given: Json, state: PodState) -> None:
    assert state_of(given) is state


def test_pods_that_find_no_machine_count_as_nothing() -> None:
    pods = [pod("p-0", "p"), starting("p-1", "p"), unschedulable("p-2", "p"), pod("p-3", "p", deleted=True)]
    assert count(pods, 3, just_asked=False) == Replicas(wanted=3, ready=1, warming=1)


def test_pods_that_are_not_made_yet_are_expected_for_a_while() -> None:
    pods = [pod("p-0", "p"), unschedulable("p-1", "p")]
    assert count(pods, 5, just_asked=True) == Replicas(wanted=5, ready=1, warming=3)
    assert count(pods, 5, just_asked=False) == Replicas(wanted=5, ready=1, warming=0)


def test_pods_that_are_about_to_leave_count_no_more() -> None:
    pods = [pod(f"p-{n}", "p") for n in range(4)]
    assert count(pods, 2, just_asked=True) == Replicas(wanted=2, ready=2)


def having(number: int, *states: Json | None) -> list[Json]:
    """A group of two whose pods are as these, its leader first; None: not there."""
    made = group(number, "p")
    return [{**each, "status": state["status"]} for each, state in zip(made, states, strict=True) if state]


def deleted(number: int) -> list[Json]:
    made = group(number, "p")
    for each in made:
        each["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return made


READY, STARTING, LOST = pod("p", "p"), starting("p", "p"), unschedulable("p", "p")


@pytest.mark.parametrize(
    ("pods", "state"),
    [
        (having(0, READY, READY), PodState.READY),
        (having(0, STARTING, READY), PodState.WARMING),
        (having(0, STARTING, None), PodState.WARMING),
        (having(0, READY, STARTING), PodState.READY),
        (having(0, STARTING, LOST), PodState.LOST),
        (having(0, LOST, None), PodState.LOST),
        (having(0, None, READY), PodState.GONE),
        (deleted(0), PodState.GONE),
        ([*having(0, STARTING, STARTING), deleted(0)[1]], PodState.WARMING),
    ],
)
def test_a_group_is_what_its_leader_is_unless_another_of_its_pods_finds_no_machine(
    pods: list[Json], state: PodState
) -> None:
    assert engines(pods) == engines(pods[::-1]) == [state]


def test_a_group_of_pods_counts_as_one_engine() -> None:
    pods = [*group(0, "p"), *having(1, STARTING, STARTING), *having(2, STARTING, LOST), *deleted(3)]
    assert count(pods, 4, just_asked=False) == Replicas(wanted=4, ready=1, warming=1)
    assert count(pods, 4, just_asked=True) == Replicas(wanted=4, ready=1, warming=2), "the one that goes comes again"
