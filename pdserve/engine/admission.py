"""What an engine refuses at the door because it could never run here."""

from dataclasses import dataclass

from pdserve.core.endpoint import EngineLimits
from pdserve.core.errors import InvalidRequest, LayoutMismatch, Unsupported
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import Request
from pdserve.core.ticket import TransferTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """The bounds of one engine: its model, its limits and the size of its block pool."""

    info: ModelInfo
    limits: EngineLimits
    num_blocks: int
    block_size: int

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together: the model's, the operator's and the pool's bound."""
        return min(self.info.max_model_len, self.limits.max_model_len, self.num_blocks * self.block_size)

    def check(self, request: Request, *, handoff: bool, ticket: TransferTicket | None) -> None:
        """Raises InvalidRequest, Unsupported, or LayoutMismatch with what to do about it."""
        prompt = request.prompt_token_ids
        if len(prompt) + 1 > self.max_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens; at most {self.max_len - 1} leave room for an answer here",
                "prompt",
            )
        if min(prompt) < 0 or max(prompt) >= self.info.vocab_size:
            raise InvalidRequest(f"token ids must lie between 0 and {self.info.vocab_size - 1}", "prompt")
        if request.sampling.seed is None:
            raise InvalidRequest("an engine needs a seed; the gateway draws one when the client gives none", "seed")
        if ticket is not None:
            self._check_ticket(request, ticket, handoff=handoff)

    def _check_ticket(self, request: Request, ticket: TransferTicket, *, handoff: bool) -> None:
        if handoff:
            raise InvalidRequest("a request either hands its KV off or fetches it, not both", "ticket")
        if not self.limits.accepts_handoff:
            raise Unsupported("this engine does not take over prefilled requests", "ticket")
        if ticket.num_tokens != len(request.prompt_token_ids):
            raise InvalidRequest(
                f"the ticket covers {ticket.num_tokens} tokens, the prompt has {len(request.prompt_token_ids)}",
                "ticket",
            )
        if ticket.max_tokens > self.max_len:
            raise InvalidRequest(
                f"the ticket may grow to {ticket.max_tokens} tokens; a sequence has at most {self.max_len} here",
                "ticket",
            )
        if ticket.block_size != self.block_size:
            raise LayoutMismatch(
                f"blocks of {ticket.engine_id} hold {ticket.block_size} tokens, blocks here {self.block_size}; "
                "start both engines with the same kv.block_size"
            )
