"""Tickets as a source would issue them."""

from pdserve.core.request import Request
from pdserve.core.ticket import TransferTicket


def make_ticket(request: Request, *, block_size: int, ticket_id: str = "t") -> TransferTicket:
    return TransferTicket(
        id=ticket_id,
        request_id=request.id,
        engine_id="prefill-0",
        epoch=1,
        address="127.0.0.1:1",
        layout_hash=b"h" * 16,
        num_tokens=len(request.prompt_token_ids),
        block_size=block_size,
        lease=10.0,
        ranks=(),
    )
