from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionCommands(_message.Message):
    __slots__ = ("commands",)
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    commands: _containers.RepeatedCompositeFieldContainer[SessionCommand]
    def __init__(self, commands: _Optional[_Iterable[_Union[SessionCommand, _Mapping]]] = ...) -> None: ...

class SessionEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[SessionEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[SessionEvent, _Mapping]]] = ...) -> None: ...

class SessionCommand(_message.Message):
    __slots__ = ("submit", "cancel_request_id", "resend_kv", "depart_request_id")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESEND_KV_FIELD_NUMBER: _ClassVar[int]
    DEPART_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel_request_id: str
    resend_kv: ResendKV
    depart_request_id: str
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel_request_id: _Optional[str] = ..., resend_kv: _Optional[_Union[ResendKV, _Mapping]] = ..., depart_request_id: _Optional[str] = ...) -> None: ...

class ResendKV(_message.Message):
    __slots__ = ("after_number",)
    AFTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    after_number: int
    def __init__(self, after_number: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "handoff", "ticket", "source")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    request: Request
    handoff: bool
    ticket: TransferTicket
    source: KVSource
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., handoff: bool = ..., ticket: _Optional[_Union[TransferTicket, _Mapping]] = ..., source: _Optional[_Union[KVSource, _Mapping]] = ...) -> None: ...

class KVSource(_message.Message):
    __slots__ = ("engine_id", "epoch", "address", "num_blocks", "least_blocks")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEAST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    epoch: int
    address: str
    num_blocks: int
    least_blocks: int
    def __init__(self, engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., least_blocks: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "prompt_token_ids", "sampling", "salt", "timeout", "sample_index")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    salt: bytes
    timeout: float
    sample_index: int
    def __init__(self, id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., salt: _Optional[bytes] = ..., timeout: _Optional[float] = ..., sample_index: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., logprobs: bool = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("description", "step", "load", "ticket", "kv_events", "kv_snapshot", "departure")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    KV_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DEPARTURE_FIELD_NUMBER: _ClassVar[int]
    description: EngineDescription
    step: StepEvent
    load: LoadSnapshot
    ticket: TransferTicket
    kv_events: KVEvents
    kv_snapshot: KVSnapshot
    departure: Departure
    def __init__(self, description: _Optional[_Union[EngineDescription, _Mapping]] = ..., step: _Optional[_Union[StepEvent, _Mapping]] = ..., load: _Optional[_Union[LoadSnapshot, _Mapping]] = ..., ticket: _Optional[_Union[TransferTicket, _Mapping]] = ..., kv_events: _Optional[_Union[KVEvents, _Mapping]] = ..., kv_snapshot: _Optional[_Union[KVSnapshot, _Mapping]] = ..., departure: _Optional[_Union[Departure, _Mapping]] = ...) -> None: ...

class Departure(_message.Message):
    __slots__ = ("request_id", "ticket", "output_token_ids", "error_code", "error_message")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    ticket: TransferTicket
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    error_code: str
    error_message: str
    def __init__(self, request_id: _Optional[str] = ..., ticket: _Optional[_Union[TransferTicket, _Mapping]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class EngineDescription(_message.Message):
    __slots__ = ("engine_id", "role", "epoch", "model_name", "model_revision", "max_model_len", "pid", "block_size", "num_blocks", "max_rows", "max_tokens_per_step", "prefix_caching", "numerics", "domain")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHING_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    role: str
    epoch: int
    model_name: str
    model_revision: str
    max_model_len: int
    pid: int
    block_size: int
    num_blocks: int
    max_rows: int
    max_tokens_per_step: int
    prefix_caching: bool
    numerics: str
    domain: str
    def __init__(self, engine_id: _Optional[str] = ..., role: _Optional[str] = ..., epoch: _Optional[int] = ..., model_name: _Optional[str] = ..., model_revision: _Optional[str] = ..., max_model_len: _Optional[int] = ..., pid: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_tokens_per_step: _Optional[int] = ..., prefix_caching: bool = ..., numerics: _Optional[str] = ..., domain: _Optional[str] = ...) -> None: ...

class KVEvents(_message.Message):
    __slots__ = ("epoch", "first_number", "changes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    first_number: int
    changes: _containers.RepeatedCompositeFieldContainer[KVChange]
    def __init__(self, epoch: _Optional[int] = ..., first_number: _Optional[int] = ..., changes: _Optional[_Iterable[_Union[KVChange, _Mapping]]] = ...) -> None: ...

class KVChange(_message.Message):
    __slots__ = ("kind", "hashes", "tier")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[KVChange.Kind]
        KIND_STORED: _ClassVar[KVChange.Kind]
        KIND_REMOVED: _ClassVar[KVChange.Kind]
        KIND_CLEARED: _ClassVar[KVChange.Kind]
    KIND_UNSPECIFIED: KVChange.Kind
    KIND_STORED: KVChange.Kind
    KIND_REMOVED: KVChange.Kind
    KIND_CLEARED: KVChange.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    kind: KVChange.Kind
    hashes: bytes
    tier: str
    def __init__(self, kind: _Optional[_Union[KVChange.Kind, str]] = ..., hashes: _Optional[bytes] = ..., tier: _Optional[str] = ...) -> None: ...

class KVSnapshot(_message.Message):
    __slots__ = ("epoch", "number", "hashes", "first", "last", "tier")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    number: int
    hashes: bytes
    first: bool
    last: bool
    tier: str
    def __init__(self, epoch: _Optional[int] = ..., number: _Optional[int] = ..., hashes: _Optional[bytes] = ..., first: bool = ..., last: bool = ..., tier: _Optional[str] = ...) -> None: ...

class StepEvent(_message.Message):
    __slots__ = ("epoch", "deltas")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    def __init__(self, epoch: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("request_id", "index", "token_ids", "logprobs", "finish_reason", "error_code", "error_message", "trace")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    finish_reason: str
    error_code: str
    error_message: str
    trace: EngineTrace
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., finish_reason: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., trace: _Optional[_Union[EngineTrace, _Mapping]] = ...) -> None: ...

class EngineTrace(_message.Message):
    __slots__ = ("engine_id", "epoch", "cached_tokens", "stamps", "transfer_backend", "transfer_bytes", "transfer_pulls", "transfer_mode", "transfer_forecast", "transfer_stages", "transfer_failovers", "fetch")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STAMPS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BACKEND_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_PULLS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MODE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FORECAST_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_STAGES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILOVERS_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    epoch: int
    cached_tokens: int
    stamps: _containers.RepeatedCompositeFieldContainer[Stamp]
    transfer_backend: str
    transfer_bytes: int
    transfer_pulls: int
    transfer_mode: str
    transfer_forecast: _containers.RepeatedCompositeFieldContainer[NamedSeconds]
    transfer_stages: _containers.RepeatedCompositeFieldContainer[NamedSeconds]
    transfer_failovers: _containers.RepeatedCompositeFieldContainer[Failover]
    fetch: PrefixFetch
    def __init__(self, engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., stamps: _Optional[_Iterable[_Union[Stamp, _Mapping]]] = ..., transfer_backend: _Optional[str] = ..., transfer_bytes: _Optional[int] = ..., transfer_pulls: _Optional[int] = ..., transfer_mode: _Optional[str] = ..., transfer_forecast: _Optional[_Iterable[_Union[NamedSeconds, _Mapping]]] = ..., transfer_stages: _Optional[_Iterable[_Union[NamedSeconds, _Mapping]]] = ..., transfer_failovers: _Optional[_Iterable[_Union[Failover, _Mapping]]] = ..., fetch: _Optional[_Union[PrefixFetch, _Mapping]] = ...) -> None: ...

class PrefixFetch(_message.Message):
    __slots__ = ("engine_id", "tokens", "num_bytes", "seconds", "backend", "error", "restore_seconds")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESTORE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    tokens: int
    num_bytes: int
    seconds: float
    backend: str
    error: str
    restore_seconds: float
    def __init__(self, engine_id: _Optional[str] = ..., tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., backend: _Optional[str] = ..., error: _Optional[str] = ..., restore_seconds: _Optional[float] = ...) -> None: ...

class NamedSeconds(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Failover(_message.Message):
    __slots__ = ("backend", "code")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    backend: str
    code: str
    def __init__(self, backend: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class Stamp(_message.Message):
    __slots__ = ("name", "unix_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    unix_seconds: float
    def __init__(self, name: _Optional[str] = ..., unix_seconds: _Optional[float] = ...) -> None: ...

class LoadSnapshot(_message.Message):
    __slots__ = ("engine_id", "epoch", "number", "running", "waiting", "backlog_tokens", "blocks", "draining", "steps", "tiers", "drain_cause", "fetching")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_CAUSE_FIELD_NUMBER: _ClassVar[int]
    FETCHING_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    epoch: int
    number: int
    running: int
    waiting: int
    backlog_tokens: int
    blocks: BlockCounts
    draining: bool
    steps: _containers.RepeatedCompositeFieldContainer[StepTally]
    tiers: _containers.RepeatedCompositeFieldContainer[TierTally]
    drain_cause: str
    fetching: int
    def __init__(self, engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., number: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., backlog_tokens: _Optional[int] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., draining: bool = ..., steps: _Optional[_Iterable[_Union[StepTally, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierTally, _Mapping]]] = ..., drain_cause: _Optional[str] = ..., fetching: _Optional[int] = ...) -> None: ...

class StepTally(_message.Message):
    __slots__ = ("steps", "tokens", "context", "seconds")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    tokens: int
    context: int
    seconds: float
    def __init__(self, steps: _Optional[int] = ..., tokens: _Optional[int] = ..., context: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class TierTally(_message.Message):
    __slots__ = ("tier", "capacity", "blocks", "saved_bytes", "restored_blocks", "restored_bytes", "evicted", "refused", "corrupt", "failed", "seconds_per_block")
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    tier: str
    capacity: int
    blocks: int
    saved_bytes: int
    restored_blocks: int
    restored_bytes: int
    evicted: int
    refused: int
    corrupt: int
    failed: int
    seconds_per_block: float
    def __init__(self, tier: _Optional[str] = ..., capacity: _Optional[int] = ..., blocks: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., restored_blocks: _Optional[int] = ..., restored_bytes: _Optional[int] = ..., evicted: _Optional[int] = ..., refused: _Optional[int] = ..., corrupt: _Optional[int] = ..., failed: _Optional[int] = ..., seconds_per_block: _Optional[float] = ...) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "used", "leased", "quarantined")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    used: int
    leased: int
    quarantined: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., used: _Optional[int] = ..., leased: _Optional[int] = ..., quarantined: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout",)
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    timeout: float
    def __init__(self, timeout: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: bool = ...) -> None: ...

class PeerHello(_message.Message):
    __slots__ = ("engine_id", "epoch", "layout_hash", "ranks", "kv_kind")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    KV_KIND_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    epoch: int
    layout_hash: bytes
    ranks: _containers.RepeatedCompositeFieldContainer[RankAddress]
    kv_kind: str
    def __init__(self, engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layout_hash: _Optional[bytes] = ..., ranks: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., kv_kind: _Optional[str] = ...) -> None: ...

class RankAddress(_message.Message):
    __slots__ = ("shard", "backends")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    shard: KVShard
    backends: _containers.RepeatedCompositeFieldContainer[BackendMetadata]
    def __init__(self, shard: _Optional[_Union[KVShard, _Mapping]] = ..., backends: _Optional[_Iterable[_Union[BackendMetadata, _Mapping]]] = ...) -> None: ...

class BackendMetadata(_message.Message):
    __slots__ = ("name", "metadata")
    NAME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    metadata: bytes
    def __init__(self, name: _Optional[str] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class HandoffCommand(_message.Message):
    __slots__ = ("source_epoch", "attach", "release", "heartbeat", "lend", "caught_up")
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LEND_FIELD_NUMBER: _ClassVar[int]
    CAUGHT_UP_FIELD_NUMBER: _ClassVar[int]
    source_epoch: int
    attach: Attach
    release: Release
    heartbeat: Heartbeat
    lend: Lend
    caught_up: CaughtUp
    def __init__(self, source_epoch: _Optional[int] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., lend: _Optional[_Union[Lend, _Mapping]] = ..., caught_up: _Optional[_Union[CaughtUp, _Mapping]] = ...) -> None: ...

class Lend(_message.Message):
    __slots__ = ("ticket_id", "hashes", "parts")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    hashes: bytes
    parts: _containers.RepeatedCompositeFieldContainer[KVPart]
    def __init__(self, ticket_id: _Optional[str] = ..., hashes: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[KVPart, _Mapping]]] = ...) -> None: ...

class CaughtUp(_message.Message):
    __slots__ = ("ticket_id",)
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    def __init__(self, ticket_id: _Optional[str] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("ticket_id", "first_block", "parts", "bulk")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BULK_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    first_block: int
    parts: _containers.RepeatedCompositeFieldContainer[KVPart]
    bulk: bool
    def __init__(self, ticket_id: _Optional[str] = ..., first_block: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[KVPart, _Mapping]]] = ..., bulk: bool = ...) -> None: ...

class KVPart(_message.Message):
    __slots__ = ("source_rank", "target_rank", "first_head", "end_head")
    SOURCE_RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    END_HEAD_FIELD_NUMBER: _ClassVar[int]
    source_rank: int
    target_rank: int
    first_head: int
    end_head: int
    def __init__(self, source_rank: _Optional[int] = ..., target_rank: _Optional[int] = ..., first_head: _Optional[int] = ..., end_head: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("ticket_id",)
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    def __init__(self, ticket_id: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("number", "ticket_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TICKET_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    ticket_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, number: _Optional[int] = ..., ticket_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class HandoffEvent(_message.Message):
    __slots__ = ("source_epoch", "region", "done", "released", "ack", "gone", "lent")
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    source_epoch: int
    region: RegionReady
    done: HandoffDone
    released: Released
    ack: HeartbeatAck
    gone: TicketGone
    lent: Lent
    def __init__(self, source_epoch: _Optional[int] = ..., region: _Optional[_Union[RegionReady, _Mapping]] = ..., done: _Optional[_Union[HandoffDone, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., ack: _Optional[_Union[HeartbeatAck, _Mapping]] = ..., gone: _Optional[_Union[TicketGone, _Mapping]] = ..., lent: _Optional[_Union[Lent, _Mapping]] = ...) -> None: ...

class Lent(_message.Message):
    __slots__ = ("ticket_id", "num_blocks", "restore_seconds")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    num_blocks: int
    restore_seconds: float
    def __init__(self, ticket_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., restore_seconds: _Optional[float] = ...) -> None: ...

class RegionReady(_message.Message):
    __slots__ = ("ticket_id", "first_block", "source_blocks", "digest", "part")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    first_block: int
    source_blocks: _containers.RepeatedScalarFieldContainer[int]
    digest: bytes
    part: KVPart
    def __init__(self, ticket_id: _Optional[str] = ..., first_block: _Optional[int] = ..., source_blocks: _Optional[_Iterable[int]] = ..., digest: _Optional[bytes] = ..., part: _Optional[_Union[KVPart, _Mapping]] = ...) -> None: ...

class HandoffDone(_message.Message):
    __slots__ = ("ticket_id", "tokens", "finished")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, ticket_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., finished: bool = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("ticket_id", "expired")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    expired: bool
    def __init__(self, ticket_id: _Optional[str] = ..., expired: bool = ...) -> None: ...

class HeartbeatAck(_message.Message):
    __slots__ = ("number", "renewed_ticket_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RENEWED_TICKET_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    renewed_ticket_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, number: _Optional[int] = ..., renewed_ticket_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class TicketGone(_message.Message):
    __slots__ = ("ticket_id", "code", "message")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    code: str
    message: str
    def __init__(self, ticket_id: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class TransferTicket(_message.Message):
    __slots__ = ("id", "request_id", "engine_id", "epoch", "address", "layout_hash", "num_tokens", "block_size", "lease", "ranks", "growth")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    GROWTH_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    engine_id: str
    epoch: int
    address: str
    layout_hash: bytes
    num_tokens: int
    block_size: int
    lease: float
    ranks: _containers.RepeatedCompositeFieldContainer[KVShard]
    growth: int
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., layout_hash: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., lease: _Optional[float] = ..., ranks: _Optional[_Iterable[_Union[KVShard, _Mapping]]] = ..., growth: _Optional[int] = ...) -> None: ...

class KVShard(_message.Message):
    __slots__ = ("rank", "first_layer", "end_layer", "first_head", "end_head")
    RANK_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    END_HEAD_FIELD_NUMBER: _ClassVar[int]
    rank: int
    first_layer: int
    end_layer: int
    first_head: int
    end_head: int
    def __init__(self, rank: _Optional[int] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., first_head: _Optional[int] = ..., end_head: _Optional[int] = ...) -> None: ...

class EngineOrder(_message.Message):
    __slots__ = ("engine_id", "kind")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[EngineOrder.Kind]
        KIND_RESTART: _ClassVar[EngineOrder.Kind]
        KIND_LEAVE: _ClassVar[EngineOrder.Kind]
        KIND_RETURN: _ClassVar[EngineOrder.Kind]
    KIND_UNSPECIFIED: EngineOrder.Kind
    KIND_RESTART: EngineOrder.Kind
    KIND_LEAVE: EngineOrder.Kind
    KIND_RETURN: EngineOrder.Kind
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    kind: EngineOrder.Kind
    def __init__(self, engine_id: _Optional[str] = ..., kind: _Optional[_Union[EngineOrder.Kind, str]] = ...) -> None: ...

class EngineOrderResponse(_message.Message):
    __slots__ = ("error_code", "error_message")
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    error_code: str
    error_message: str
    def __init__(self, error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class WatchEndpointsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EndpointSet(_message.Message):
    __slots__ = ("number", "endpoints")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    def __init__(self, number: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("engine_id", "role", "epoch", "address", "pid", "state")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    role: str
    epoch: int
    address: str
    pid: int
    state: str
    def __init__(self, engine_id: _Optional[str] = ..., role: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...
