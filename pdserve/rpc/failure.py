"""What made a session fail, out of whatever its tasks raised."""

import grpc

from pdserve.core.errors import PdserveError


def root_cause(error: Exception) -> PdserveError | grpc.aio.AioRpcError | None:
    """The most telling error in a (nested) group: one of ours, else the RPC's status.

    None for anything else, such as the InvalidStateError of a write that met the end of its call.
    """
    leaves = _leaves(error)
    for leaf in leaves:
        if isinstance(leaf, PdserveError):
            return leaf
    return next((leaf for leaf in leaves if isinstance(leaf, grpc.aio.AioRpcError)), None)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for member in error.exceptions for leaf in _leaves(member)]
    return [error]
