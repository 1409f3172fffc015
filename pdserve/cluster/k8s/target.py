"""The object that holds a pool's pods, by its name in the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.config.scaler import KubernetesConfig
from pdserve.core.endpoint import Role

_APPS, _RAY, _LWS = ("apps", "v1"), ("ray.io", "v1"), ("leaderworkerset.x-k8s.io", "v1")
_RESOURCES = {
    "StatefulSet": (_APPS, "statefulsets"),
    "Deployment": (_APPS, "deployments"),
    "LeaderWorkerSet": (_LWS, "leaderworkersets"),
    "RayCluster": (_RAY, "rayclusters"),
}
SET_LABEL = "leaderworkerset.sigs.k8s.io/name"
"""Label of every pod of a LeaderWorkerSet."""


@dataclass(frozen=True, slots=True)
class Target:
    """kind: StatefulSet, Deployment, LeaderWorkerSet or RayCluster. group: the worker group of a RayCluster."""

    kind: str
    name: str
    group: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.kind, self.name, self.group)))

    @property
    def group_version(self) -> tuple[str, str]:
        """Of its API."""
        return _RESOURCES[self.kind][0]

    @property
    def resource(self) -> str:
        return _RESOURCES[self.kind][1]

    @property
    def has_scale(self) -> bool:
        """Whether its number of pods, or of a LeaderWorkerSet that of groups, is read and set apart from the rest."""
        return self.kind != "RayCluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A target as the API server has it. replicas: pods, or groups of a LeaderWorkerSet. selector: the labels of its
    pods."""

    replicas: int
    selector: str
    uid: str
    place: int = 0
    """Of the worker group in its RayCluster."""


def targets_of(config: KubernetesConfig) -> dict[Role, Target]:
    """Those that are configured."""
    named = {Role.PREFILL: config.prefill, Role.DECODE: config.decode}
    return {role: Target(*name.split("/")) for role, name in named.items() if name is not None}


def held(target: Target, answer: Mapping[str, Any]) -> Held | None:
    """From the target's scale, or from a RayCluster itself; None when that has no such worker group."""
    uid = answer["metadata"].get("uid", "")
    if target.has_scale:
        selector = answer.get("status", {}).get("selector", "")
        if target.kind == "LeaderWorkerSet":  # whose own selector leaves out all but the leaders
            selector = f"{SET_LABEL}={target.name}"
        return Held(replicas=answer.get("spec", {}).get("replicas", 0), selector=selector, uid=uid)
    for place, group in enumerate(answer["spec"].get("workerGroupSpecs", ())):
        if group["groupName"] == target.group:
            selector = f"ray.io/cluster={target.name},ray.io/group={target.group}"
            return Held(replicas=group.get("replicas", 0), selector=selector, uid=uid, place=place)
    return None
