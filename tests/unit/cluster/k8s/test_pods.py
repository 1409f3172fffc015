"""How pods count."""

import pytest

from pdserve.cluster.k8s.pods import PodState, count, state_of
from pdserve.scaler.decision import Replicas
from tests.unit.cluster.k8s.api_server import Json, pod, starting, unschedulable


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
