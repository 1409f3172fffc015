"""The configuration of one pdserve deployment: every setting, its default and its range.

Names are the keys of the YAML file. Rules that span several settings are in `checks`; reading files,
environment and flags is in `load`.
"""

from enum import StrEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    SerializationInfo,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
)

from pdserve.config.times import Times
from pdserve.core.admission import LEAST_URGENT, MOST_URGENT
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.layout import KVOrder

DEMO_MODEL = "demo"
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Priority = Annotated[int, Field(ge=MOST_URGENT, le=LEAST_URGENT)]


TransferBackendName = Literal["nixl", "shared_memory", "gloo", "nccl", "grpc"]


def _network(value: object, parse: ValidatorFunctionWrapHandler) -> object:
    try:
        return parse(value)
    except ValidationError:
        raise ValueError("must be an IPv4 network such as 10.1.0.0/16, or one address") from None


Network = Annotated[IPv4Network, WrapValidator(_network)]


def _shown(secret: SecretStr, info: SerializationInfo) -> str:
    """In clear only to whoever asks for it."""
    return secret.get_secret_value() if info.context and info.context.get("reveal") else str(secret)


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


class Section(BaseModel):
    """Frozen; refuses unknown keys, silent conversions and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PlacementConfig(Section):
    """What each engine takes of the Ray node it is placed on; the process launcher has no use for it."""

    cpus: Annotated[float, Field(ge=0)] | None = None
    """By default one for each rank."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """A fraction lets engines share a GPU. By default none on cpu, otherwise a fair share of what there is."""
    resources: dict[NonEmpty, Annotated[float, Field(gt=0)]] = {}
    """Names of your own that nodes offer, for engines to be placed only there."""


class PoolConfig(Section):
    """How many engines of a role there are, and how much each takes on. Fields as in EngineLimits."""

    engines: Annotated[int, Field(ge=0, le=512)]
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks that compute each engine's model together, each in a process of its own; pools may differ."""
    max_tokens_per_step: Positive
    max_rows: Positive
    chunk_size: Positive
    accepts_handoff: bool
    prefix_caching: bool = True
    depth: Literal[1, 2] = 2
    domain: NonEmpty | tuple[NonEmpty, ...] | None = None
    """Name of the fast network the engines are on, such as a rack or an NVLink switch; or several, which they have in
    turn: prefill-0 the first, prefill-1 the second. PDSERVE_DOMAIN in an engine's environment comes before this."""
    placement: PlacementConfig = PlacementConfig()

    @property
    def cpus(self) -> float:
        """Of the Ray node, for each engine."""
        return self.tensor_parallel if self.placement.cpus is None else self.placement.cpus

    def limits(self, max_model_len: int) -> EngineLimits:
        """max_model_len in tokens, prompt and answer together."""
        return EngineLimits(
            max_model_len=max_model_len,
            **self.model_dump(exclude={"engines", "tensor_parallel", "domain", "placement"}),
        )

    def domain_of(self, number: int) -> str:
        """Of the engine of that number, as far as this says; empty if it does not."""
        if isinstance(self.domain, tuple):
            return self.domain[number % len(self.domain)] if self.domain else ""
        return self.domain or ""


class PrefillPool(PoolConfig):
    """Reads prompts: large steps, few sequences."""

    engines: Annotated[int, Field(ge=0, le=512)] = 1
    max_tokens_per_step: Positive = 1024
    max_rows: Positive = 16
    chunk_size: Positive = 256
    accepts_handoff: bool = False


class DecodePool(PoolConfig):
    """Writes tokens: many sequences, and small chunks for the short prompts it reads by itself."""

    engines: Annotated[int, Field(ge=0, le=512)] = 1
    max_tokens_per_step: Positive = 256
    max_rows: Positive = 64
    chunk_size: Positive = 128
    accepts_handoff: bool = True


class UnifiedPool(PoolConfig):
    """Does both, without handoffs: the baseline disaggregation is compared with."""

    engines: Annotated[int, Field(ge=0, le=512)] = 0
    max_tokens_per_step: Positive = 512
    max_rows: Positive = 32
    chunk_size: Positive = 256
    accepts_handoff: bool = True


class PoolsConfig(Section):
    prefill: PrefillPool = PrefillPool()
    decode: DecodePool = DecodePool()
    unified: UnifiedPool = UnifiedPool()

    def by_role(self) -> dict[Role, PoolConfig]:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.UNIFIED: self.unified}


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


class SloConfig(Section):
    """What a new request is held against before it is let in. The defaults suit no application: they only keep a
    cluster that has far too much to do from doing it too late. Set your own."""

    ttft: Annotated[float, Field(gt=0)] = 10.0
    """Seconds from a request's arrival to its first token."""
    tpot: Annotated[float, Field(gt=0)] = 1.0
    """Seconds per token after the first."""


class AdmissionConfig(Section):
    """Requests that no engine can start yet wait in the gateway; those whose first token would come too late are told
    so at once."""

    enabled: bool = True
    """false: everything goes to the engines at once and waits there. Tenants' limits hold nevertheless."""
    headroom: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of slo.ttft that a predicted wait may use up; predictions err."""
    max_waiting: Positive = 256
    """Requests of one tenant that may wait."""
    steps_ahead: Annotated[float, Field(ge=0)] = 0.25
    """Full steps of prompts that engines have in front of them before requests wait here. With none, short prompts are
    computed one by one; more makes everybody wait for whoever sends most."""


class TenantConfig(Section):
    """Clients with keys, a share of the cluster and a cache of their own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    keys: tuple[Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")], ...]
    """SHA-256 of each API key, as `pdserve keys new` prints it."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the engines against other tenants', while they want more than there is."""
    requests_per_second: Annotated[float, Field(gt=0)] | None = None
    burst: Positive | None = None
    """Requests that may come at once; by default what may come in a second."""
    concurrent_requests: Positive | None = None
    """Those in progress, waiting ones included."""
    share_group: NonEmpty | None = None
    """Tenants that name the same group find each other's prompts in the cache, and can find out what others ask by how
    fast an answer begins. Without, nobody shares."""
    priority: Priority = 0
    """The most urgent its requests may ask for; the lower goes first."""


class RedisConfig(Section):
    """State that several routers share (docs/routers.md). Without a url each is on its own."""

    url: Annotated[SecretStr, Field(min_length=9)] | None = None
    """redis://[[user]:password@]host[:port][/db], rediss:// for TLS."""
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "pdserve"
    """Before every key: routers of one namespace share engines and tenants."""

    @field_serializer("url")
    def _hide_url(self, url: SecretStr | None, info: SerializationInfo) -> str | None:
        return _shown(url, info) if url else None


class IdempotencyConfig(Section):
    """Requests with an `Idempotency-Key`: a client that asks again gets the one answer."""

    keep: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after its end for which an answer is kept."""
    max_answers: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Answers one router keeps in its memory; of more, the oldest go."""


class LimitsConfig(Section):
    """What one client may ask for."""

    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(4 * 2**20)
    max_chat_tokens: Positive = 1024
    """Longest chat answer when the request names no max_tokens."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from a request's arrival to its last token, queueing included."""


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
        return [_shown(key, info) for key in keys]

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
