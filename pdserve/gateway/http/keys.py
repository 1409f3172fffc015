"""The header `Idempotency-Key`, and the answer to a request that may have one."""

from starlette.requests import Request

from pdserve.gateway.answer import AnswerView
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.http.disconnect import until_disconnect
from pdserve.gateway.keyed import IdempotencyKey, checked_key

HEADER = "idempotency-key"


async def key_of(request: Request, endpoint: str) -> IdempotencyKey | None:
    """None if the client gave none. The body must have been read. Raises InvalidRequest."""
    given = request.headers.get(HEADER)
    if given is None:
        return None
    return IdempotencyKey.of(checked_key(given), request.state.identity, endpoint, await request.body())


async def answer_to(request: Request, gateway: Gateway, ask: Ask) -> AnswerView:
    """Raises what Gateway.answer raises, Cancelled when the client goes away while another router executes it."""
    return await until_disconnect(request.receive, gateway.answer(ask)) if ask.key else gateway.begin(ask)
