"""Errors as gRPC statuses; the one table of them."""

from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2

from pdserve.core import errors
from pdserve.core.errors import PdserveError

_STATUS: dict[type[PdserveError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.KeyReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.TransferError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    PdserveError: grpc.StatusCode.INTERNAL,
}

_UNAVAILABLE_RETRY_AFTER = 1.0


def status_of(error: PdserveError) -> grpc.StatusCode:
    """Status of an error: that of its nearest listed class."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PdserveError) -> NoReturn:
    """End a call with an error's status, message, `error-code` and `error-param`, and when to try again."""
    metadata: list[tuple[str, str | bytes]] = [("error-code", error.code)]
    param = getattr(error, "param", None)
    if param:
        metadata.append(("error-param", param))
    retry_after = retry_after_of(error)
    if retry_after is not None:
        metadata.append(("grpc-retry-pushback-ms", str(int(retry_after * 1000))))
        metadata.append(("grpc-status-details-bin", _with_retry_info(error, retry_after)))
    await context.abort(status_of(error), str(error), tuple(metadata))
    raise AssertionError("abort raises")


def retry_after_of(error: PdserveError) -> float | None:
    """Seconds after which trying again may help; None if it does not."""
    if isinstance(error, errors.Overloaded):
        return error.retry_after
    return _UNAVAILABLE_RETRY_AFTER if isinstance(error, errors.Unavailable | errors.TransferError) else None


def _with_retry_info(error: PdserveError, retry_after: float) -> bytes:
    """The google.rpc.Status that goes with the error."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(int(retry_after * 1e9))
    status = status_pb2.Status(code=status_of(error).value[0], message=str(error))
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())
