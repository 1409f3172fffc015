"""The configuration's scaler: where it is, and whose pods or Ray nodes it counts and changes on Kubernetes."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pdserve.config.section import NonEmpty, Port, Section

_NAME = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_TARGET = re.compile(rf"(StatefulSet|Deployment|LeaderWorkerSet)/{_NAME}|RayCluster/{_NAME}/{_NAME}")


def _target(value: str) -> str:
    if not _TARGET.fullmatch(value):
        raise ValueError("must be StatefulSet/NAME, Deployment/NAME, LeaderWorkerSet/NAME or RayCluster/NAME/GROUP")
    return value


ScaleTarget = Annotated[str, AfterValidator(_target)]


class KubernetesConfig(Section):
    """What holds the pods of each pool, and how scalers agree on the one that acts. With `pdserve scale` each pod, or
    each group of pods of a LeaderWorkerSet, is an engine; with `pdserve serve` each pod is a Ray node that offers room
    for one."""

    namespace: NonEmpty | None = None
    """By default that of the pod's service account, or of the kubeconfig's context."""
    lease: Annotated[str, Field(pattern=rf"^{_NAME}$")] = "pdserve-scaler"
    """Of several `pdserve scale`, the one that holds the Lease of this name acts."""
    prefill: ScaleTarget | None = None
    decode: ScaleTarget | None = None


class ScalerConfig(Section):
    """A scaler apart from gateways (`pdserve scale`). That of `pdserve serve` needs only `kubernetes`, and that for Ray
    nodes in pods."""

    address: Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+:[0-9]{1,5})?$")] = ""
    """host:port of the scaler that the gateways of `pdserve route` tell of their load, and obey."""
    port: Port = 8103
    """Where `pdserve scale` listens for them."""
    kubernetes: KubernetesConfig = KubernetesConfig()
