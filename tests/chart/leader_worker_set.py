"""What the operator of LeaderWorkerSets (leaderworkerset.x-k8s.io/v1) takes, as far as the chart uses it, and what its
webhooks make of a pod's variables. Anything else is refused."""

from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, Field

from deploy.chart import Manifest

VARIABLES = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")
"""Put before the variables of each container, in place of those of the same names."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
    """Of a Service, too, so no more than a Service's name may be."""
    labels: dict[str, str]
    annotations: dict[str, str] = {}


class _Rolling(_Strict):
    maxUnavailable: Annotated[int, Field(ge=1)]
    maxSurge: Annotated[int, Field(ge=0)]


class _Rollout(_Strict):
    type: Literal["RollingUpdate"]
    rollingUpdateConfiguration: _Rolling


class _Network(_Strict):
    subdomainPolicy: Literal["Shared", "UniquePerReplica"]


class _Template(_Strict):
    size: Annotated[int, Field(ge=1)]
    restartPolicy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
    leaderTemplate: dict[str, Any]
    workerTemplate: dict[str, Any]


class _Spec(_Strict):
    replicas: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    startupPolicy: Literal["LeaderCreated", "LeaderReady"]
    networkConfig: _Network
    rolloutStrategy: _Rollout
    leaderWorkerTemplate: _Template


class _LeaderWorkerSet(_Strict):
    apiVersion: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: _Metadata
    spec: _Spec


def validate(manifest: Manifest, version: str) -> None:
    """Raises ValidationError, of pydantic or of kubernetes_validate for the templates of pods, by the schema of that
    version of Kubernetes."""
    template = _LeaderWorkerSet.model_validate(manifest).spec.leaderWorkerTemplate
    for pod in (template.leaderTemplate, template.workerTemplate):
        holder = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
        kubernetes_validate.validate(holder, version, strict=True)
