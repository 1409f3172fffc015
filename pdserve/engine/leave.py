"""What of a running sequence that moves to another engine concerns scheduling and blocks: the source's half of a
migration without messages, times and clients.

                       begin                    stop                     no step in flight
    running ────────────────────▶ leaving ────────────────▶ stopping ────────────────────────▶ handed over, ended here
       ▲    blocks are leased        │   its target caught up   │                              with HANDOFF
       └──────────── stay ───────────┴──────────────────────────┘
            its ticket ended, or it outgrew it

It decodes on until it has stopped, and is never preempted meanwhile: blocks that others may read give no room.
"""

from pdserve.core.endpoint import EngineLimits
from pdserve.engine.core_events import Computed, CoreEvent, Departing, HandedOver, Outgrown
from pdserve.engine.sequence import Leave, Sequence, SequenceState
from pdserve.kvcache.manager import KVCacheManager

GROWTH = 256
"""Tokens a sequence may add before it has to have stopped: seconds of decoding, and blocks its target sets aside."""


def may_leave(sequence: Sequence, limits: EngineLimits) -> bool:
    """Whether there is a state to hand over, and enough left to do for somebody else."""
    decoding = sequence.state is SequenceState.RUNNING and not sequence.handoff
    last_known = sequence.num_computed_tokens == len(sequence.token_ids) - 1
    return decoding and last_known and _tokens_left(sequence) > 2 * limits.depth


def begin(sequence: Sequence, ticket_id: str, kv: KVCacheManager) -> Departing:
    """Lease what is computed. A sequence that is leaving already starts anew; its earlier ticket's lease runs on."""
    num_tokens = sequence.num_computed_tokens
    growth = min(GROWTH, _tokens_left(sequence))
    sequence.leave = Leave(ticket_id, num_tokens, num_tokens + growth)
    return Departing(
        ticket_id=ticket_id,
        num_tokens=num_tokens,
        growth=growth,
        source_blocks=kv.lease(sequence, ticket_id, num_tokens),
        output_token_ids=tuple(sequence.token_ids[sequence.prompt_len : num_tokens]),
    )


def grown(sequence: Sequence, before: int, limits: EngineLimits, kv: KVCacheManager) -> CoreEvent | None:
    """A leaving sequence's KV grew from `before` tokens: lease blocks that are full by it."""
    leave = sequence.leave
    assert leave is not None
    if leave.max_tokens < sequence.num_scheduled_tokens + limits.depth and _tokens_left(sequence) > limits.depth:
        sequence.leave = None
        return Outgrown(sequence_id=sequence.sequence_id)
    num_tokens = sequence.num_computed_tokens
    if before // kv.block_size == num_tokens // kv.block_size:
        return None
    blocks = kv.extend_lease(sequence, leave.ticket_id, num_tokens)
    return Computed(sequence_id=sequence.sequence_id, num_tokens=num_tokens, source_blocks=blocks)


def has_stopped(sequence: Sequence) -> bool:
    return sequence.leave is not None and sequence.leave.stopping and not sequence.num_placeholders


def hand_over(sequence: Sequence, kv: KVCacheManager) -> HandedOver:
    """Lease the rest of what was computed."""
    leave, num_tokens = sequence.leave, sequence.num_computed_tokens
    assert leave is not None
    return HandedOver(
        sequence_id=sequence.sequence_id,
        num_tokens=num_tokens,
        token_ids=tuple(sequence.token_ids[leave.num_tokens :]),
        source_blocks=kv.extend_lease(sequence, leave.ticket_id, num_tokens),
    )


def _tokens_left(sequence: Sequence) -> int:
    return sequence.max_output_tokens - sequence.num_output_tokens
