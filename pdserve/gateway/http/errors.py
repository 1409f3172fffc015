"""Errors on the wire: one envelope, and the one table of statuses.

Every answer with a status of 400 or more has the body `{"error": {"message", "type", "param", "code"}}`.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pdserve.core import errors
from pdserve.core.errors import PdserveError
from pdserve.telemetry.metrics import Metrics

log = structlog.get_logger("pdserve.gateway")

_STATUS: dict[type[PdserveError], int] = {
    errors.InvalidRequest: 400,
    errors.KeyReused: 422,
    errors.ModelNotFound: 404,
    errors.Overloaded: 429,
    errors.Cancelled: 499,
    errors.Unavailable: 503,
    errors.TransferError: 503,
    errors.DeadlineExceeded: 504,
    PdserveError: 500,
}
_CODE = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "too_large"}
_MESSAGE = {404: "there is nothing at this path", 405: "this path does not take this method"}
_OF_REQUESTS = (408, 413)
"""Statuses of requests; the others are of paths and methods."""
_UNAVAILABLE_RETRY_AFTER = 1


def status_of(error: PdserveError) -> int:
    """HTTP status of an error: that of its nearest listed class."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def envelope(status: int, message: str, code: str, param: str | None = None) -> dict[str, object]:
    """The body of every error."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: PdserveError) -> dict[str, object]:
    """The envelope of a deliberate error."""
    param = "model" if isinstance(error, errors.ModelNotFound) else getattr(error, "param", None)
    return envelope(status_of(error), str(error), error.code, param)


def internal_error_body() -> dict[str, object]:
    """The envelope of a defect: nothing of what went wrong gets out."""
    return envelope(500, "internal error; the server's log has the details", PdserveError.code)


def error_response(status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Make every error an app can raise come out in the envelope."""

    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, PdserveError)
        metrics.rejections.labels(error.code).inc()
        return error_response(status_of(error), error_body(error), _retry_headers(error))

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        metrics.rejections.labels(errors.InvalidRequest.code).inc()
        message, param = _describe(error.errors()[0])
        return error_response(400, envelope(400, message, errors.InvalidRequest.code, param))

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _CODE.get(error.status_code, errors.InvalidRequest.code)
        message = _MESSAGE.get(error.status_code, str(error.detail))
        if error.status_code in _OF_REQUESTS:
            metrics.rejections.labels(code).inc()
        return error_response(error.status_code, envelope(error.status_code, message, code), error.headers)

    app.add_exception_handler(PdserveError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _retry_headers(error: PdserveError) -> dict[str, str]:
    if isinstance(error, errors.Overloaded):
        return {"Retry-After": str(max(1, ceil(error.retry_after)))}
    if isinstance(error, errors.Unavailable | errors.TransferError):
        return {"Retry-After": str(_UNAVAILABLE_RETRY_AFTER)}
    return {}


def _describe(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """Message and parameter of pydantic's first complaint; the offending value is not repeated."""
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}", None
    param = _path(problem["loc"][1:])
    if not param:
        return "the body must be a JSON object", None
    return f"{param}: {problem['msg']}", param


def _path(location: Sequence[str | int]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
