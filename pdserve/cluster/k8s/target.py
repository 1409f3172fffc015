"""The object that holds a pool's pods, by its name in the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.config.scaler import KubernetesConfig
from pdserve.core.endpoint import Role

_VERSIONS = {"StatefulSet": "apps/v1", "Deployment": "apps/v1", "RayCluster": "ray.io/v1"}


@dataclass(frozen=True, slots=True)
class Target:
    """kind: StatefulSet, Deployment or RayCluster. group: the worker group of a RayCluster."""

    kind: str
    name: str
    group: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.kind, self.name, self.group)))

    @property
    def api_version(self) -> str:
        return _VERSIONS[self.kind]


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
    if target.kind != "RayCluster":
        selector = answer.get("status", {}).get("selector", "")
        return Held(replicas=answer.get("spec", {}).get("replicas", 0), selector=selector, uid=uid)
    for place, group in enumerate(answer["spec"].get("workerGroupSpecs", ())):
        if group["groupName"] == target.group:
            selector = f"ray.io/cluster={target.name},ray.io/group={target.group}"
            return Held(replicas=group.get("replicas", 0), selector=selector, uid=uid, place=place)
    return None
