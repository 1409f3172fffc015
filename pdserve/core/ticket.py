"""The claim an engine hands out for a sequence's KV, the hint where to borrow some, and the messages that make either
good."""

from dataclasses import dataclass
from hashlib import blake2b

from pdserve.core.shards import KVPart, KVShard

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTicket:
    """A leased claim on the KV of one prompt, valid for one epoch of one engine.

    lease is in seconds from issue and renewed by heartbeats. address is the source's gRPC address. ranks are what each
    rank of the source holds; all of them use the same block ids. growth is 0 for a prompt; a running sequence that is
    to move may add so many tokens of KV to num_tokens, at least 1, before it stops.
    """

    id: str
    request_id: str
    engine_id: str
    epoch: int
    address: str
    layout_hash: bytes
    num_tokens: int
    block_size: int
    lease: float
    ranks: tuple[KVShard, ...]
    growth: int = 0

    @property
    def num_blocks(self) -> int:
        return self.blocks_for(self.num_tokens)

    @property
    def max_tokens(self) -> int:
        """Tokens whose KV may come to be handed over."""
        return self.num_tokens + self.growth

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A running sequence's answer to being asked to leave: the ticket for its KV, which whoever continues it presents.

    output_token_ids are those of its output tokens whose KV the ticket covers already.
    """

    ticket: TransferTicket
    output_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionReady:
    """Blocks of a ticket whose KV is final on the source, as far as they are in one of the parts the target asked for.

    first_block is the logical index (in the prompt) of source_blocks[0]. digest is over the bytes
    of exactly these blocks and heads in logical order, seeded with `region_seed` of the same ticket, place and part.
    """

    ticket_id: str
    first_block: int
    source_blocks: tuple[int, ...]
    digest: bytes
    part: KVPart | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffDone:
    """The source computes no more: tokens, at least one, are those it sampled behind the ticket's num_tokens, and KV of
    all but the last of them is handed over. A prompt's only token is the answer's first.

    finished means the request ended there (EOS, stop id, max_tokens, cancel): nothing to decode.
    """

    ticket_id: str
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketGone:
    """The source does not (or no longer) vouch for the ticket; code is that of a core error."""

    ticket_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSource:
    """An engine that should hold KV of a prompt's first num_blocks blocks, for the one that is to compute the prompt.

    Only a hint: what it names may be gone when it is asked for. Fetching fewer than least_blocks takes longer than
    computing them."""

    engine_id: str
    epoch: int
    address: str
    num_blocks: int
    least_blocks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """The source has leased the first num_blocks (at least one) of the blocks it was asked to lend; their regions
    follow. Logical indices of a loan count from the first block asked for. restore_seconds is what restoring them from
    a tier first took."""

    ticket_id: str
    num_blocks: int
    restore_seconds: float = 0.0


HandoffNews = RegionReady | HandoffDone | TicketGone | Lent


def region_seed(ticket_id: str, epoch: int, first_block: int, part: KVPart | None = None) -> int:
    """64-bit digest seed that binds a region's bytes to its ticket, source incarnation and place (block, rank and
    heads), so that a replayed, swapped or stale region cannot verify."""
    place = f"{first_block}|{part.source_rank}|{part.heads}" if part else f"{first_block}"
    text = f"{ticket_id}|{epoch}|{place}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
