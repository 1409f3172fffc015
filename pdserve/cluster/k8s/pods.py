"""What a pool's pods are, counted. Pure."""

from collections.abc import Iterable, Mapping, Sequence
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
GROUP_LABEL, INDEX_LABEL = "leaderworkerset.sigs.k8s.io/group-index", "leaderworkerset.sigs.k8s.io/worker-index"
"""Of the pods of a LeaderWorkerSet: which group they are of, and their place in it; the leader's is 0."""

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


def engines(pods: Iterable[Pod]) -> Sequence[PodState]:
    """Of each pod, or of each group of a LeaderWorkerSet, which is one engine."""
    states: list[PodState] = []
    groups: dict[str, list[Pod]] = {}
    for pod in pods:
        if group := _labels(pod).get(GROUP_LABEL):
            groups.setdefault(group, []).append(pod)
        else:
            states.append(state_of(pod))
    return [*states, *map(_state_of_group, groups.values())]


def _state_of_group(pods: Sequence[Pod]) -> PodState:
    """Its leader's, who is ready when all ranks have joined, unless another pod waits for what may never come. Without
    a leader what is left is about to go."""
    leader = next((state_of(pod) for pod in pods if _labels(pod).get(INDEX_LABEL) == "0"), PodState.GONE)
    waits = any(state_of(pod) is PodState.LOST for pod in pods)
    return PodState.LOST if waits and leader is PodState.WARMING else leader


def _labels(pod: Pod) -> Mapping[str, str]:
    return pod["metadata"].get("labels") or {}


def count(pods: Iterable[Pod], wanted: int, *, just_asked: bool) -> Replicas:
    """just_asked: engines that are wanted and not there will come; otherwise something, such as a quota, is against
    it."""
    states = engines(pods)
    ready, warming = states.count(PodState.READY), states.count(PodState.WARMING)
    if just_asked:
        warming += max(0, wanted - len(states) + states.count(PodState.GONE))
    ready = min(ready, wanted)
    return Replicas(wanted=wanted, ready=ready, warming=min(warming, wanted - ready))
