"""Bodies that do not come whole."""

import pytest
from starlette.types import Message

from pdserve.core.errors import Cancelled
from pdserve.gateway.http.body import BodyRequest


async def test_a_client_that_leaves_amid_its_body_is_no_defect_of_ours() -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(Cancelled):
        await BodyRequest(scope, receive).body()
