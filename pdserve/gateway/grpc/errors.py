"""Errors as gRPC statuses; the one table of them."""

from typing import Any, NoReturn

import grpc

from pdserve.core import errors
from pdserve.core.errors import PdserveError

_STATUS: dict[type[PdserveError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.TransferError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    PdserveError: grpc.StatusCode.INTERNAL,
}


def status_of(error: PdserveError) -> grpc.StatusCode:
    """Status of an error: that of its nearest listed class."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PdserveError) -> NoReturn:
    """End a call with an error's status, message, `error-code` and `error-param`."""
    metadata = [("error-code", error.code)]
    param = getattr(error, "param", None)
    if param:
        metadata.append(("error-param", param))
    if isinstance(error, errors.Overloaded):
        metadata.append(("grpc-retry-pushback-ms", str(int(error.retry_after * 1000))))
    await context.abort(status_of(error), str(error), tuple(metadata))
    raise AssertionError("abort raises")
