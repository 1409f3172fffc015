"""What a pool's pods are, counted. Pure."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pdserve.scaler.decision import Replicas

_HOPELESS = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
    }
)
"""Why a container waits for an operator rather than for time."""

Pod = Mapping[str, Any]


class PodState(StrEnum):
    """READY: serves. WARMING: has its machine, or may get one any moment. LOST: waits for what may never come, a
    machine with room or an operator. GONE: ends, or has ended."""

    READY = "ready"
    WARMING = "warming"
    LOST = "lost"
    GONE = "gone"


def state_of(pod: Pod) -> PodState:
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed"):
        return PodState.GONE
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or ()}
    if conditions.get("Ready") == "True":
        return PodState.READY
    if conditions.get("PodScheduled") == "False":
        return PodState.LOST
    containers = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    reasons = {container.get("state", {}).get("waiting", {}).get("reason") for container in containers}
    return PodState.LOST if reasons & _HOPELESS else PodState.WARMING


def count(pods: Iterable[Pod], wanted: int, *, just_asked: bool) -> Replicas:
    """just_asked: pods that are wanted and not there will come; otherwise something, such as a quota, is against it."""
    states = [state_of(pod) for pod in pods]
    ready, warming = states.count(PodState.READY), states.count(PodState.WARMING)
    if just_asked:
        warming += max(0, wanted - len(states) + states.count(PodState.GONE))
    ready = min(ready, wanted)
    return Replicas(wanted=wanted, ready=ready, warming=min(warming, wanted - ready))
