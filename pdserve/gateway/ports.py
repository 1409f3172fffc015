"""What the gateway needs of the rest of the system."""

from collections.abc import AsyncGenerator
from typing import Protocol

from pdserve.core.cluster import EngineView
from pdserve.core.request import Request, TokenDelta
from pdserve.telemetry.record import RequestRecord


class Generator(Protocol):
    """Runs requests on engines. Implementation: dispatch.

    generate streams a request's deltas and fills in its record; the last delta has a finish_reason. Closing
    the iterator cancels the request. It raises a PdserveError when the request cannot be served.
    """

    def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]: ...

    def engines(self) -> tuple[EngineView, ...]: ...

    @property
    def ready(self) -> bool: ...
