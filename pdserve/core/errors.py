"""Every error pdserve raises on purpose.

PdserveError
├── InvalidRequest            the client's input; names the parameter
│   ├── Unsupported           understood, but this version does not do it
│   └── KeyReused             an idempotency key that came with another body before
├── ModelNotFound
├── ConfigError               the operator's input
├── CheckpointError           a model directory that cannot be served
├── Overloaded                try again later
│   └── RateLimited           the tenant's own limit
├── Unavailable               no engine can serve this now
│   └── EngineDied            the engine holding the work is gone
│       └── EngineSilent      or has not been heard from for too long, and may be well
├── Denied                    whoever owns the machines does not let this process do it
├── Conflict                  something was changed meanwhile; look again
├── DeadlineExceeded
├── Cancelled
├── NotANumber                the model's own output is unusable
└── TransferError             a KV handoff that did not complete
    ├── TransferTimeout       our deadline passed; the destination is quarantined
    ├── TransferFailed        the backend reported an error; the transfer is over
    ├── DigestMismatch        bytes arrived, but not the bytes that were sent
    ├── LayoutMismatch        the two engines cannot exchange KV
    ├── LinkLost              the line to the peer broke or went silent; the peer may be well
    ├── StaleEpoch            the peer is another incarnation than the ticket names
    ├── MalformedMessage      the peer said something the protocol does not allow
    └── LeaseExpired          the source no longer vouches for its blocks

`code` is the stable machine-readable name used on every wire.
"""


class PdserveError(Exception):
    """Base of all deliberate errors; `str(error)` is safe to show to a client."""

    code = "internal_error"


class InvalidRequest(PdserveError):
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unsupported(InvalidRequest):
    code = "unsupported"


class KeyReused(InvalidRequest):
    code = "idempotency_key_reused"


class ModelNotFound(PdserveError):
    code = "model_not_found"


class ConfigError(PdserveError):
    code = "config_error"


class CheckpointError(PdserveError):
    code = "checkpoint_error"


class Overloaded(PdserveError):
    """`retry_after` is in seconds."""

    code = "overloaded"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class Unavailable(PdserveError):
    code = "unavailable"


class EngineDied(Unavailable):
    code = "engine_died"


class EngineSilent(EngineDied):
    """To a client the same as a death, and told by its code."""


class Denied(PdserveError):
    code = "denied"


class Conflict(PdserveError):
    code = "conflict"


class DeadlineExceeded(PdserveError):
    code = "deadline_exceeded"


class Cancelled(PdserveError):
    code = "cancelled"


class NotANumber(PdserveError):
    code = "not_a_number"


class TransferError(PdserveError):
    code = "transfer_error"


class TransferTimeout(TransferError):
    code = "transfer_timeout"


class TransferFailed(TransferError):
    code = "transfer_failed"


class DigestMismatch(TransferError):
    code = "digest_mismatch"


class LayoutMismatch(TransferError):
    code = "layout_mismatch"


class LinkLost(TransferError):
    code = "link_lost"


class StaleEpoch(TransferError):
    code = "stale_epoch"


class MalformedMessage(TransferError):
    """Bytes from another process of the cluster that no correct one of this version sends."""

    code = "malformed_message"


class LeaseExpired(TransferError):
    code = "lease_expired"


def _all_errors(base: type[PdserveError]) -> dict[str, type[PdserveError]]:
    """By code; a subclass without a code of its own is told as the class it has it from."""
    found = {base.code: base}
    for subclass in base.__subclasses__():
        found = _all_errors(subclass) | found
    return found


def from_wire(code: str, message: str) -> PdserveError:
    """Rebuild an error received as (code, message); an unknown code becomes the base class."""
    return _all_errors(PdserveError).get(code, PdserveError)(message)
