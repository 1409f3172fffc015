"""State and decisions of routing: inputs and outputs of pure functions, the same in cluster and simulator."""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.core.endpoint import Endpoint, LoadSnapshot


class Mode(StrEnum):
    """Where prompt and tokens of a request are computed."""

    DISAGGREGATED = "disaggregated"
    DECODE_LOCAL = "decode_local"
    PREFILL_LOCAL = "prefill_local"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine as the router knows it: its last snapshot plus what was booked since.

    booked_requests and booked_tokens count work dispatched there that has not ended yet, so that the
    view never waits for a snapshot. load is None until the first heartbeat.
    """

    endpoint: Endpoint
    load: LoadSnapshot | None
    booked_requests: int = 0
    booked_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Everything a routing decision may look at. now is monotonic seconds."""

    now: float
    engines: tuple[EngineView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way a request could have gone; cost is in the routing policy's unit, lower is better."""

    prefill: str | None
    decode: str | None
    mode: Mode
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The joint choice for one request. In a local mode both endpoints are the one engine.

    alternatives are the candidates that lost, cheapest first; reason says in words why this won.
    """

    mode: Mode
    prefill: Endpoint
    decode: Endpoint
    reason: str
    alternatives: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Load booked on a route until the request ends; released exactly once."""

    request_id: str
    prefill: str
    decode: str
    prompt_tokens: int
    horizon_tokens: int
