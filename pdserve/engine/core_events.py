"""What the engine core tells its caller: plain values, in the order in which things happened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pdserve.core.blocks import BlockHash
from pdserve.core.request import FinishReason
from pdserve.core.ticket import KVSource, TransferTicket
from pdserve.core.tiers import SavedBlock


class Emitted(NamedTuple):
    """Tokens for the client. index is the place of token_ids[0] among the request's output tokens.

    finish_reason None with a Finished right behind it: the request goes on at another engine. error is
    (code, message) when finish_reason is ERROR.
    """

    sequence_id: int
    request_id: str
    index: int  # type: ignore[assignment]  # hides the tuple's own
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffScheduled:
    """A handoff sequence got all blocks of its prompt; they are leased under ticket_id.

    source_blocks hold the prompt in logical order. KV of the first num_cached_tokens tokens (whole
    blocks) is final already; Computed tells of the rest.
    """

    sequence_id: int
    request_id: str
    ticket_id: str
    num_tokens: int
    source_blocks: tuple[int, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """KV of a handoff sequence's positions below num_tokens is final: the steps that wrote it were collected.

    source_blocks are the leased ones as in HandoffScheduled, when they have become more."""

    sequence_id: int
    num_tokens: int
    source_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Departing:
    """A running sequence is ready to move; it goes on meanwhile. Of its tokens the first num_tokens have KV here, in
    source_blocks, leased under ticket_id; output_token_ids are those among them that were emitted. It may add growth
    tokens of KV before it must have stopped."""

    ticket_id: str
    num_tokens: int
    growth: int
    source_blocks: tuple[int, ...]
    output_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """A leaving sequence has stopped for good. KV of its first num_tokens tokens lies in the leased source_blocks;
    token_ids are those sampled behind the ticket's. Emitted with HANDOFF and Finished follow."""

    sequence_id: int
    num_tokens: int
    token_ids: tuple[int, ...]
    source_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgrown:
    """A leaving sequence has no room left in its ticket: it stays."""

    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReady:
    """The blocks for a ticket's KV are allocated: the pull may start.

    fetch_blocks maps logical block index → target block for every block the ticket's KV may come to fill and that
    was not found in the local prefix cache: a suffix, empty when all of it was found.
    """

    sequence_id: int
    request_id: str
    ticket: TransferTicket
    fetch_blocks: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchAborted:
    """A fetching sequence ended early. These target blocks are quarantined until the caller, knowing
    that nothing writes into them any more, gives them to unquarantine (in one or several parts)."""

    sequence_id: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReady:
    """Part of a prompt's KV lies in a tier, or in the cache of another engine (source), and the target blocks for it
    are allocated: the restore may start.

    Answered by restore_ended, once, and perhaps by restore_late before. admission tells the sequence's lives apart.
    """

    sequence_id: int
    admission: int
    hashes: tuple[BlockHash, ...]
    blocks: tuple[int, ...]
    source: KVSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReady:
    """These blocks are to be copied to the tiers; they stay as they are until the caller says `saved`.

    used: other blocks that sequences have found in the device pool. wrong: blocks whose KV was computed wrong, to be
    deleted there."""

    blocks: tuple[SavedBlock, ...]
    used: tuple[BlockHash, ...]
    wrong: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The sequence is gone from this engine. cached_tokens and stamps are for the EngineTrace."""

    sequence_id: int
    cached_tokens: int
    stamps: tuple[tuple[str, float], ...]


CoreEvent = (
    Emitted
    | HandoffScheduled
    | Computed
    | HandedOver
    | Outgrown
    | FetchReady
    | FetchAborted
    | RestoreReady
    | SaveReady
    | Finished
)
