"""How requests come in: who they belong to, what they wait for, and what they used in the end."""

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_TENANT = "default"
"""Whoever belongs to no tenant of the configuration."""
MOST_URGENT, LEAST_URGENT = -100, 100
"""Priorities a request may ask for; as in other servers, the lower goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRules:
    """weight: its share of the engines against that of others. requests_per_second: on average, up to burst at once;
    concurrent_requests: waiting ones included. None: no limit."""

    weight: float = 1.0
    requests_per_second: float | None = None
    burst: int = 1
    concurrent_requests: int | None = None


class Rejection(StrEnum):
    """Why a request was not let in."""

    TTFT = "ttft"
    """Its first token would come later than the target."""
    DEADLINE = "deadline"
    """It would not be complete in the time its client gives."""
    QUEUE = "queue_full"
    RATE = "rate_limit"
    CONCURRENCY = "concurrency_limit"


@dataclass(slots=True, kw_only=True)
class Admission:
    """What admission foresaw for one request and did with it. Times in seconds.

    predicted_wait: until it would be sent to an engine; predicted_ttft: from its arrival here to its first token.
    ahead: requests that waited and would go first. waited: None while it waits. rejection: None if it was let in.
    """

    tenant: str
    priority: int
    predicted_wait: float
    predicted_ttft: float
    ttft_target: float
    ahead: int = 0
    waited: float | None = None
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one request took of the cluster: seconds of computing its prompt on one engine, blocks of KV times the
    seconds they were held, and bytes that engines fetched from each other for it."""

    prefill_seconds: float = 0.0
    kv_block_seconds: float = 0.0
    link_bytes: int = 0
