"""The values of the Helm chart. Their JSON schema, which Helm holds every install against, is generated from here.

`config` is the configuration file of pdserve itself and `policies` its scaling policy, by the models that read them,
without what the chart decides.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pdserve.config.schema import Config
from pdserve.scaler.policy import Policy

DECIDED_BY_CHART = frozenset(
    {
        "model",
        "served_model_name",
        "host",
        "port",
        "grpc_port",
        "admin_host",
        "admin_port",
        "launcher",
        "engine_network",
        "ray",
        "discovery",
        "only",
        "engine_prefix",
        "redis",
        "policies",
        "scaler",
        "api_keys",
        "api_keys_file",
    }
)
_SECTIONS_BY_CHART = ("RayConfig", "DiscoveryConfig", "ScalerConfig", "KubernetesConfig")
_BY_CHART_IN_POOLS = frozenset({"engines", "placement"})

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
OptionalName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Objects = list[dict[str, Any]]
"""Of the Kubernetes API, passed on as they are."""
Strings = dict[str, str]
Port = Annotated[int, Field(ge=1, le=65535)]


class Values(BaseModel):
    """Frozen; refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImageName(Values):
    repository: Annotated[str, Field(min_length=1)]
    tag: str
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class Image(ImageName):
    pullSecrets: Objects


class ClaimSource(Values):
    claimName: OptionalName


class HostPathSource(Values):
    path: Annotated[str, Field(pattern=r"^(/.*)?$")]


class ImageSource(Values):
    reference: str
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class DownloadSource(Values):
    image: str
    command: list[str]
    args: list[str]
    env: Objects
    size: Quantity
    ports: list[Port]


class Model(Values):
    source: Literal["demo", "pvc", "hostPath", "image", "download"]
    name: str
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9._/-]*$")]
    pvc: ClaimSource
    hostPath: HostPathSource
    image: ImageSource
    download: DownloadSource


class Auth(Values):
    existingSecret: OptionalName


class Resources(Values):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class RayHead(Values):
    resources: Resources


class Ray(Values):
    mode: Literal["none", "builtin", "kuberay"]
    existingSecret: OptionalName
    version: str
    head: RayHead


class Component(Values):
    """What routers, engines and scalers have in common."""

    replicas: AtLeastOne
    resources: Resources
    nodeSelector: Strings
    tolerations: Objects
    affinity: dict[str, Any]
    env: Objects
    podAnnotations: Strings
    maxUnavailable: AtLeastOne | Annotated[str, Field(pattern=r"^[0-9]{1,3}%$")]


class Service(Values):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    annotations: Strings


class Router(Component):
    service: Service


class BundledRedis(Values):
    image: ImageName
    memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*(mb|gb)$")]
    resources: Resources
    nodeSelector: Strings
    tolerations: Objects


class ExternalRedis(Values):
    port: Port
    peers: Objects


class Redis(Values):
    mode: Literal["none", "bundled", "external"]
    existingSecret: OptionalName
    bundled: BundledRedis
    external: ExternalRedis


class Rdma(Values):
    resource: Annotated[str, Field(pattern=r"^([a-z0-9.-]+/[A-Za-z0-9_.-]+)?$")]
    count: AtLeastOne = 1


class Pool(Component):
    replicas: Annotated[int, Field(ge=1, le=512)]
    gpus: Annotated[int, Field(ge=0, le=64)]
    gpuResource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$")]
    rdma: Rdma
    sharedMemory: Quantity
    priorityClassName: OptionalName
    runtimeClassName: OptionalName


class Placement(Values):
    domain: Literal["none", "preferred", "required"]
    domainLabel: str
    spreadOver: Annotated[str, Field(min_length=1)]
    spread: Literal["ScheduleAnyway", "DoNotSchedule"]


class Drain(Values):
    preStopSeconds: Annotated[int, Field(ge=0, le=600)]
    gracePeriodSeconds: Count | None = None


class Probes(Values):
    periodSeconds: AtLeastOne
    timeoutSeconds: AtLeastOne
    livenessFailures: AtLeastOne
    minReadySeconds: Count


class ApiServer(Values):
    peers: Objects
    ports: Annotated[list[Port], Field(min_length=1)]


class NetworkPolicy(Values):
    enabled: bool
    clients: Objects
    monitoring: Objects
    routerEgress: Objects
    apiServer: ApiServer


class ServiceAccount(Values):
    annotations: Strings


class Switch(Values):
    enabled: bool


class ServiceMonitor(Switch):
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")]
    labels: Strings


class Labelled(Switch):
    labels: Strings


class Monitoring(Values):
    serviceMonitor: ServiceMonitor
    rules: Labelled
    dashboard: Labelled


class HpaPool(Values):
    minReplicas: AtLeastOne
    maxReplicas: AtLeastOne
    metric: str
    targetAverageValue: str


class Hpa(Switch):
    prefill: HpaPool
    decode: HpaPool


class KedaPool(Values):
    minReplicas: Count
    maxReplicas: AtLeastOne
    threshold: Annotated[float, Field(gt=0)]


class Keda(Switch):
    serverAddress: Annotated[str, Field(pattern=r"^(https?://\S+)?$")]
    prefill: KedaPool
    decode: KedaPool
    pollingInterval: AtLeastOne
    cooldownPeriod: Count


class Test(Values):
    resources: Resources


class ChartValues(Values):
    """Everything in values.yaml but `config` and `policies`. Helm merges a file of yours over the defaults before it is
    held against the schema, so everything is there."""

    nameOverride: OptionalName
    image: Image
    model: Model
    auth: Auth
    ray: Ray
    router: Router
    redis: Redis
    prefill: Pool
    decode: Pool
    scaler: Component
    placement: Placement
    drain: Drain
    probes: Probes
    networkPolicy: NetworkPolicy
    serviceAccount: ServiceAccount
    podDisruptionBudget: Switch
    monitoring: Monitoring
    hpa: Hpa
    keda: Keda
    test: Test


def schema() -> dict[str, Any]:
    """JSON schema of values.yaml."""
    chart, config = ChartValues.model_json_schema(), Config.model_json_schema()
    sections = config.pop("$defs")
    for pool in ("PrefillPool", "DecodePool"):
        _leave_out(sections[pool], _BY_CHART_IN_POOLS)
    _leave_out(sections["PoolsConfig"], {"unified"})
    _leave_out(config, DECIDED_BY_CHART)
    for unused in (*_SECTIONS_BY_CHART, "UnifiedPool", "PlacementConfig", "Launcher"):
        del sections[unused]
    chart["$defs"] |= sections | {"Config": config} | _policy()
    whole = {name: {"$ref": f"#/$defs/{model}"} for name, model in (("config", "Config"), ("policies", "Policy"))}
    chart["properties"] |= whole | {"global": {"type": "object"}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_terse(chart)}


def _policy() -> dict[str, Any]:
    """Definitions of a scaling policy, which may be empty: then there is none. Pools are what the chart has."""
    policy = Policy.model_json_schema()
    sections: dict[str, Any] = policy.pop("$defs")
    pools = sections["PoolPolicies"]
    _leave_out(pools, {"unified"})
    pools["properties"] = {name: {"$ref": "#/$defs/PoolPolicy"} for name in pools["properties"]}
    del policy["required"]
    return sections | {"Policy": policy}


def _leave_out(section: dict[str, Any], names: frozenset[str] | set[str]) -> None:
    for name in names:
        del section["properties"][name]


def _terse(node: Any) -> Any:
    """Without titles, which repeat names, and defaults, which Helm does not apply."""
    match node:
        case dict():
            named = {"properties", "$defs"}
            return {
                key: {name: _terse(inner) for name, inner in value.items()} if key in named else _terse(value)
                for key, value in node.items()
                if key not in ("title", "default")
            }
        case list():
            return [_terse(item) for item in node]
    return node
