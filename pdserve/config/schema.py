"""The configuration of one pdserve deployment: every setting, its default and its range.

Names are the keys of the YAML file. Rules that span several settings are in `checks`; reading files,
environment and flags is in `load`.
"""

from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    ByteSize,
    Field,
    SecretStr,
    SerializationInfo,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
)

from pdserve.config.clients import (
    AdmissionConfig,
    IdempotencyConfig,
    LimitsConfig,
    RedisConfig,
    SloConfig,
    TenantConfig,
)
from pdserve.config.pools import PoolsConfig
from pdserve.config.scaler import ScalerConfig
from pdserve.config.section import NonEmpty, Port, Positive, Section, shown
from pdserve.config.times import Times
from pdserve.core.layout import KVOrder

DEMO_MODEL = "demo"


TransferBackendName = Literal["nixl", "shared_memory", "gloo", "nccl", "grpc"]


def _network(value: object, parse: ValidatorFunctionWrapHandler) -> object:
    try:
        return parse(value)
    except ValidationError:
        raise ValueError("must be an IPv4 network such as 10.1.0.0/16, or one address") from None


Network = Annotated[IPv4Network, WrapValidator(_network)]


class Launcher(StrEnum):
    """What starts engines. RAY: actors of a Ray cluster, which may be this machine alone. PROCESS: plain
    processes on this machine, without Ray."""

    RAY = "ray"
    PROCESS = "process"


class Device(StrEnum):
    """AUTO is cuda where torch finds one, otherwise cpu; it is decided in the engine's process."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class WorkerMode(StrEnum):
    """Where an engine's torch part runs. AUTO: in the engine's process on cpu, in its own on cuda or with several
    ranks."""

    AUTO = "auto"
    INPROC = "inproc"
    PROCESS = "process"


class RayConfig(Section):
    """The cluster of the ray launcher."""

    address: NonEmpty | None = None
    """host:port of a cluster to join; without it, one is started on this machine and ends with us."""
    node_ip: NonEmpty | None = None
    """This machine's address in the cluster: by default 127.0.0.2 in one of our own, else as Ray finds it."""
    auth_token_file: NonEmpty | None = None
    """The token of the cluster to join; by default where Ray looks for it (RAY_AUTH_TOKEN, ~/.ray/auth_token)."""


class DiscoveryConfig(Section):
    """Where `pdserve route` looks for engines that `pdserve engine` has started elsewhere."""

    engines: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+:[0-9]{1,5}$")], ...] = ()
    """host:port of engines. A name with several addresses, such as a headless Service, stands for all of them and is
    resolved every second."""


class DiskTierConfig(Section):
    """KV on disk: a file readable for the server's user only, found again after a restart."""

    path: NonEmpty | None = None
    """A folder on a local disk; each engine uses a part of it that is named after it."""
    size: ByteSize | None = None
    """Of each engine's part, taken at once."""


class TiersConfig(Section):
    """KV kept below the device pool of each engine: what host memory has no room for goes to disk, if there is one.
    Without either, KV the pool has no room for is computed again."""

    host: ByteSize | None = None
    """Of each engine, taken at once."""
    disk: DiskTierConfig = DiskTierConfig()


class KVConfig(Section):
    """KV memory of each engine, or of each of its ranks."""

    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens per block; all engines share it, because blocks are what they exchange."""
    num_blocks: Annotated[int, Field(ge=2)] | None = None
    """Size of an engine's pool in blocks; give this or memory."""
    memory: ByteSize | None = None
    """Size of the pool in bytes or as "256MiB", of each rank. With neither: 256 MiB on cpu, 8 GiB on cuda."""
    order: KVOrder = KVOrder.BLOCK_MAJOR
    backends: tuple[TransferBackendName, ...] = ("nixl", "shared_memory", "grpc")
    """What moves KV, in order of preference. Two engines use the fastest they have in common, the preferred one
    where speeds are close, and another one when that fails."""
    quarantine_limit: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of an engine's blocks above which quarantine that does not end (times.quarantine) has it drain and start
    again; 1 never does."""
    tiers: TiersConfig = TiersConfig()


class RoutingConfig(Section):
    decode_local_below: Annotated[int, Field(ge=0)] = 32
    """Prompts with fewer tokens than this left to compute are read by the decode engine itself."""
    policy: NonEmpty = "kv_aware"
    """kv_aware, prefix, least_loaded, round_robin, to compare with dynamo and llm_d, or a class of your own as
    "module:Class"."""
    index_blocks: Positive = 10_000_000
    """Blocks the router remembers, each once per engine that holds it, at 0.2 kB. Of more, the oldest are forgotten."""
    fallback: bool = True
    """Whether one pool may serve whole requests while the other has no engine, or every decode engine is full."""
    fetch: bool = True
    """Whether an engine may fetch a prompt's beginning from another's cache where that should be sooner there than
    computed."""
    fetch_margin: Annotated[float, Field(ge=0)] = 0.25
    """A fetch must be predicted to save more than what it takes by this share of that."""
    topology: Literal["preferred", "required"] = "preferred"
    """How much engines' domains matter: KV moves within one where that costs no more than it is worth, or never leaves
    it. Engines without a domain go with all."""
    rebalance: bool = False
    """Whether a running request may move to another decode engine because its own is short of KV or much slower by all
    that runs there."""


class ReplayConfig(Section):
    """Going on with a request elsewhere after its engine was lost."""

    max_attempts: Positive = 3
    """The first one counts; 1 switches replay off."""
    poison_deaths: Positive = 2
    """A request that was present at so many engines' deaths is refused."""
    rate: Annotated[float, Field(gt=0)] = 64.0
    """Replays per second of one gateway, all requests together."""
    burst: Positive = 128
    patience: Annotated[float, Field(ge=0)] = 10.0
    """Seconds a running request waits for an engine to come back."""


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class TelemetryConfig(Section):
    """What is kept and told of requests, beyond logs and metrics."""

    requests_kept: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Records of the latest requests kept for `pdserve explain`, a few kilobytes each."""
    vllm_names: bool = False
    """Whether /metrics also has what vLLM has names for under those, for dashboards and scalers made for them."""
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    """An OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318; without it nothing is sent."""


class Config(Section):
    """Everything a deployment can be told. model is a checkpoint directory, or "demo"."""

    model: NonEmpty = DEMO_MODEL
    served_model_name: NonEmpty | None = None
    """What clients call the model; by default the directory's name."""
    host: NonEmpty = "127.0.0.1"
    port: Port = 8000
    grpc_port: Port = 8001
    admin_host: NonEmpty = "127.0.0.1"
    """Where /admin and /metrics are; apart from host, so that clients of the API do not reach them."""
    admin_port: Port | None = None
    """By default 8002, or a free port where another deployment has taken that."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that speak with clients on port and grpc_port (HTTP, templates, tokens and text). With one, it decides
    and speaks with engines, too; several do that by one gateway process behind them."""
    launcher: Launcher = Launcher.RAY
    engine_network: Network | None = None
    """Engines listen on, and are reached at, their machine's address in this network ("10.1.0.0/16", or one address).
    By default 127.0.0.1 for plain processes, and the Ray node's address on Ray."""
    device: Device = Device.AUTO
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: Positive = 2048
    """Prompt and answer together, in tokens; a model made for less lowers it."""
    deterministic: Literal["auto", True, False] = "auto"
    """Same tokens whatever else is in the batch. auto: on cpu."""
    worker: WorkerMode = WorkerMode.AUTO
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Compute threads of each worker on cpu."""
    policies: NonEmpty | None = None
    """A file with a scaling policy (docs/autoscaling.md); it is read again whenever it changes. Without, pools stay as
    they are."""
    scaler: ScalerConfig = ScalerConfig()
    ray: RayConfig = RayConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    pools: PoolsConfig = PoolsConfig()
    kv: KVConfig = KVConfig()
    routing: RoutingConfig = RoutingConfig()
    replay: ReplayConfig = ReplayConfig()
    limits: LimitsConfig = LimitsConfig()
    times: Times = Times()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    slo: SloConfig = SloConfig()
    admission: AdmissionConfig = AdmissionConfig()
    redis: RedisConfig = RedisConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    only: Literal["router", "engines"] | None = None
    """Run a router that serves with the engines others have announced in Redis, or engines for such routers. By default
    both."""
    engine_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Before the names of engines, where several deployments with engines share a Redis."""
    tenants: tuple[TenantConfig, ...] = ()
    api_keys: tuple[Annotated[SecretStr, Field(min_length=8)], ...] = ()
    """The simple case, and the operators' keys: clients without a tenant, each with a cache of its own, together one
    tenant named "default". Where there are tenants or keys, nobody enters without one."""
    api_keys_file: NonEmpty | None = None
    """A file with one key per line; empty lines and lines beginning with # are skipped."""

    @field_serializer("api_keys")
    def _hide_keys(self, keys: tuple[SecretStr, ...], info: SerializationInfo) -> list[str]:
        return [shown(key, info) for key in keys]

    @property
    def model_path(self) -> Path:
        if self.model == DEMO_MODEL:
            return Path(__file__).parents[1] / "assets" / "demo"
        return Path(self.model)

    @property
    def model_name(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        return "pdserve-demo" if self.model == DEMO_MODEL else self.model_path.resolve().name


def to_wire(config: Config) -> str:
    """JSON for a child process, keys in clear: for pipes only, never for logs or files."""
    return config.model_dump_json(context={"reveal": True})


def from_wire(text: str) -> Config:
    return Config.model_validate_json(text)
