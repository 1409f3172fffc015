"""What a front and its gateway say to each other: msgpack over a Unix socket, many messages in a frame.

An Ask is answered by deltas and exactly one Last, whatever becomes of the request; a Call by one Answer of its number.
"""

import msgspec

from pdserve.core.errors import InvalidRequest, Overloaded, PdserveError, from_wire
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta
from pdserve.router.directory import Naming
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.totals import Samples


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Run a request. hashes: of its prompt, one after the other, by the way of naming blocks."""

    request: Request
    record: RequestRecord
    hashes: tuple[tuple[Naming, bytes], ...]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Ended(msgspec.Struct, tag=True, frozen=True):
    """What only the front knows of a request's end; first_sent is Unix seconds."""

    request_id: str
    status: str
    finish_reason: str | None
    output_tokens: int
    first_sent: float | None


class Claim(msgspec.Struct, tag=True, frozen=True):
    """Answered with a Claimed."""

    name: str
    owner: str
    fingerprint: bytes


class Finish(msgspec.Struct, tag=True, frozen=True):
    """Answered with nothing, as the next two."""

    name: str
    owner: str
    result: bytes


class Release(msgspec.Struct, tag=True, frozen=True):
    name: str
    owner: str


class AwaitChange(msgspec.Struct, tag=True, frozen=True):
    name: str
    timeout: float


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Answered with whether the client had such a request running."""

    request_id: str
    salt: bytes
    tenant: str


class GetOverview(msgspec.Struct, tag=True, frozen=True):
    """Answered with an Overview."""


Asked = Claim | Finish | Release | AwaitChange | Abort | GetOverview


class Call(msgspec.Struct, tag=True, frozen=True):
    number: int
    asked: Asked


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Nobody waits for the answer of that number any more."""

    number: int


class Counted(msgspec.Struct, tag=True, frozen=True):
    """By how much the front's metrics have grown: when it is asked, and before it ends."""

    grown: Samples


FromFront = Ask | Cancel | Ended | Call | Drop | Counted


class Failure(msgspec.Struct, frozen=True):
    """A PdserveError on its way."""

    code: str
    message: str
    param: str | None = None
    retry_after: float = 0.0

    @classmethod
    def of(cls, error: PdserveError) -> "Failure":
        param = error.param if isinstance(error, InvalidRequest) else None
        retry_after = error.retry_after if isinstance(error, Overloaded) else 0.0
        return cls(error.code, str(error), param, retry_after)

    def error(self) -> PdserveError:
        error = from_wire(self.code, self.message)
        if isinstance(error, InvalidRequest):
            error.param = self.param
        if isinstance(error, Overloaded):
            error.retry_after = self.retry_after
        return error


class Last(msgspec.Struct, tag=True, frozen=True):
    """A request has ended: with a delta that has a finish_reason, or with a failure. The record says all that the
    gateway knows of it."""

    request_id: str
    record: RequestRecord
    delta: TokenDelta | None = None
    failure: Failure | None = None


class Answer(msgspec.Struct, tag=True, frozen=True):
    """value is set when there is no failure."""

    number: int
    value: msgspec.Raw
    failure: Failure | None = None


class Claimed(msgspec.Struct, frozen=True):
    """Claims.claim's answer: Busy for so many seconds, Kept, or Mine when both are None."""

    busy: float | None = None
    kept: bytes | None = None


class Taken(msgspec.Struct, tag=True, frozen=True):
    """As Claims.on_taken is told."""

    name: str
    owner: str


class State(msgspec.Struct, tag=True, frozen=True):
    """How the gateway stands: told at once, and whenever it changes."""

    ready: bool
    degraded: tuple[str, ...]
    namings: tuple[Naming, ...]


class Count(msgspec.Struct, tag=True, frozen=True):
    """Answered with Counted."""


FromGateway = TokenDelta | Last | Answer | Taken | State | Count

FRONT_FRAME: msgspec.msgpack.Decoder[list[FromFront]] = msgspec.msgpack.Decoder(list[FromFront])
GATEWAY_FRAME: msgspec.msgpack.Decoder[list[FromGateway]] = msgspec.msgpack.Decoder(list[FromGateway])
