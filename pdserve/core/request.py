"""What a client asks for, and the units in which the answer comes back."""

from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite, isnan

from pdserve.core.admission import DEFAULT_TENANT, LEAST_URGENT, MOST_URGENT
from pdserve.core.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a sequence ended. STOP covers EOS, stop ids and stop strings, as in the OpenAI API.

    HANDOFF ends a prefill engine's share of a request that a decode engine continues; clients never
    see it.
    """

    STOP = "stop"
    LENGTH = "length"
    HANDOFF = "handoff"
    CANCELLED = "cancelled"
    ERROR = "error"


LEAST_TEMPERATURE = 1e-6
"""Below it one token has all the chance, and scores divided by it are too large for float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Raises InvalidRequest naming the parameter.

    temperature below LEAST_TEMPERATURE is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch the filter
    off.
    Filters apply in the order repetition penalty, temperature, top_k, top_p, min_p.
    min_tokens bans EOS and stop ids until that many tokens exist. seed None lets the gateway draw one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _check(isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        _check(self.top_k >= 0, "top_k", "0 (off) or positive")
        _check(isfinite(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        _check(isfinite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        _check(
            isfinite(self.repetition_penalty) and 0.01 <= self.repetition_penalty <= 100,
            "repetition_penalty",
            "between 0.01 and 100",
        )
        _check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", f"between 0 and {MAX_SEED}")
        _check(self.max_tokens >= 1, "max_tokens", "at least 1")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        _check(
            all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop),
            "stop",
            f"strings of 1 to {MAX_STOP_LENGTH} characters",
        )
        _check(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "non-negative token ids")


def _check(holds: bool, param: str, must_be: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} must be {must_be}", param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One immutable client ask, already tokenized.

    salt separates the prefix caches of tenants. timeout is in seconds from submission; every process
    turns it into a deadline on its own monotonic clock. tenant and priority (the lower goes first) decide who waits for
    whom in the gateway, and stay there.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    salt: bytes = b""
    timeout: float = 600.0
    sample_index: int = 0
    tenant: str = DEFAULT_TENANT
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", "prompt")
        _check(not isnan(self.timeout), "timeout", "a number of seconds")
        _check(MOST_URGENT <= self.priority <= LEAST_URGENT, "priority", f"between {MOST_URGENT} and {LEAST_URGENT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixFetch:
    """How an engine's fetch of a prompt's beginning from the cache of another went.

    tokens: those whose KV arrived and verified. seconds: from asking to the source's word that its lease had held, or
    to the error; restore_seconds of them the source restored from a tier what it then lent. error is its code, empty
    when all went well."""

    engine_id: str
    tokens: int
    num_bytes: int
    seconds: float
    backend: str
    error: str = ""
    restore_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTrace:
    """What one engine did for one request; sent with its last delta.

    stamps: (event name, Unix time in seconds), in order of occurrence. Names: docs/request-lifecycle.md.
    transfer_mode is progressive or bulk, transfer_forecast the seconds predicted for each (empty when too little was
    known), transfer_stages the seconds its pulls spent in queue, post, wire and verify, transfer_failovers the
    (backend, error code) of reads that another backend took over.
    """

    engine_id: str
    epoch: int
    cached_tokens: int
    stamps: tuple[tuple[str, float], ...]
    transfer_backend: str = ""
    transfer_bytes: int = 0
    transfer_pulls: int = 0
    transfer_mode: str = ""
    transfer_forecast: tuple[tuple[str, float], ...] = ()
    transfer_stages: tuple[tuple[str, float], ...] = ()
    transfer_failovers: tuple[tuple[str, str], ...] = ()
    fetch: PrefixFetch | None = None
