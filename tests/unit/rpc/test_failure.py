"""The end of a session has one cause, however its tasks met it."""

import asyncio

import grpc

from pdserve.core.errors import EngineDied
from pdserve.rpc.failure import root_cause

OVER = asyncio.InvalidStateError("RPC already finished.")
DIED = EngineDied("silent")
STATUS = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())


def test_our_own_error_tells_most_then_the_rpcs_status() -> None:
    assert root_cause(ExceptionGroup("", [OVER, STATUS, ExceptionGroup("", [DIED])])) is DIED
    assert root_cause(ExceptionGroup("", [OVER, STATUS])) is STATUS
    assert root_cause(STATUS) is STATUS


def test_a_write_that_met_the_end_of_its_call_is_no_cause_of_its_own() -> None:
    assert root_cause(ExceptionGroup("", [OVER])) is None
