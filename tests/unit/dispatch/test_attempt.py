"""Of two engines that serve a request together, whose word counts."""

import asyncio

import pytest

from pdserve.core.errors import Cancelled, DeadlineExceeded, EngineDied, PdserveError
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.attempt import _unless_failed
from tests.clocks import settle


@pytest.mark.parametrize(
    ("decode", "wanted"),
    [(Cancelled("the request ended at its source"), DeadlineExceeded), (EngineDied("d0"), EngineDied)],
)
async def test_a_request_cancelled_at_its_source_ends_with_what_ended_it_there(
    decode: PdserveError, wanted: type[PdserveError]
) -> None:
    prefill: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
    decoded: asyncio.Future[TokenDelta] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(_unless_failed(prefill, decoded))
    await settle()
    decoded.set_exception(decode)
    await settle()
    if not prefill.done():
        prefill.set_exception(DeadlineExceeded("too late"))
    with pytest.raises(wanted):
        await waiting
