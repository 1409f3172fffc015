"""How urgent a request is, and until when its answer is of use: by header, or by field of the body, which wins."""

from math import isfinite

from starlette.requests import Request

from pdserve.core.errors import InvalidRequest
from pdserve.gateway.http.schemas import GenerationBody

PRIORITY, TIMEOUT = "x-request-priority", "x-request-timeout"


def priority_of(request: Request, body: GenerationBody) -> int:
    """0 if nothing is said. Raises InvalidRequest."""
    if body.priority is not None:
        return body.priority
    try:
        return int(request.headers.get(PRIORITY, "0"))
    except ValueError:
        raise InvalidRequest(f"{PRIORITY} must be a whole number", PRIORITY) from None


def timeout_of(request: Request, body: GenerationBody) -> float | None:
    """Seconds, None if nothing is said. Raises InvalidRequest."""
    if body.timeout is not None:
        return body.timeout
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not isfinite(seconds) or seconds <= 0:
        raise InvalidRequest(f"{TIMEOUT} must be a positive number of seconds", TIMEOUT)
    return seconds
