"""The object that holds a pool's pods, by its name in the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.config.scaler import KubernetesConfig
from pdserve.core.endpoint import Role

_APPS, _RAY = ("apps", "v1"), ("ray.io", "v1")
_RESOURCES = {
    "StatefulSet": (_APPS, "statefulsets"),
    "Deployment": (_APPS, "deployments"),
    "RayCluster": (_RAY, "rayclusters"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """kind: StatefulSet, Deployment or RayCluster. group: the worker group of a RayCluster."""

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
        """Whether its number of pods is read and set apart from the rest of it."""
        return self.kind != "RayCluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A target as the API server has it. selector: the labels of its pods."""

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
        return Held(replicas=answer.get("spec", {}).get("replicas", 0), selector=selector, uid=uid)
    for place, group in enumerate(answer["spec"].get("workerGroupSpecs", ())):
        if group["groupName"] == target.group:
            selector = f"ray.io/cluster={target.name},ray.io/group={target.group}"
            return Held(replicas=group.get("replicas", 0), selector=selector, uid=uid, place=place)
    return None
