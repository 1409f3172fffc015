"""What the gateway needs of the rest of the system."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pdserve.cluster.registry import EngineOrder
from pdserve.core.cluster import EngineView
from pdserve.core.endpoint import Endpoint
from pdserve.core.request import Request
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.auth import Identity
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.totals import Series


class Generator(Protocol):
    """Runs requests on engines. Implementation: dispatch.

    generate streams a request's deltas and fills in its record; the last delta has a finish_reason. Closing
    the iterator cancels the request. It raises a PdserveError when the request cannot be served.
    """

    def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]: ...

    def engines(self) -> tuple[EngineView, ...]: ...

    @property
    def ready(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSummary:
    """An engine and how many sequences it has; zeros before its first report."""

    endpoint: Endpoint
    running: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a whole gateway does, however many processes it has. running: its requests."""

    running: int
    engines: tuple[EngineSummary, ...]


class Elsewhere(Protocol):
    """What a front must ask its gateway for. Both raise Unavailable when it does not answer."""

    async def abort(self, request_id: str, identity: Identity) -> bool:
        """As Intake.abort, of requests of all fronts."""
        ...

    async def overview(self) -> Overview: ...


CountElsewhere = Callable[[], Awaitable[Mapping[Series, float]]]
"""What other processes of this gateway have counted, added up."""

PreparePrompt = Callable[[Request], Awaitable[None]]
"""Called with a request that is about to be generated: what takes long for its prompt and need not be done on the
event loop."""

MoveRequest = Callable[[str], Awaitable[None]]
"""Has a request that decodes now, by its id, go on at another engine. Raises PdserveError when it does not."""

OrderEngine = Callable[[str, EngineOrder], Awaitable[None]]
"""Passes an operator's order for an engine id on to whoever owns the engines. Raises PdserveError to refuse."""

ExplainScaling = Callable[[], Awaitable[bytes]]
"""The scaler's state and decisions, JSON. Raises Unavailable when it does not answer."""
