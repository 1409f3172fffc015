"""What engines say to one another of KV that is to move."""

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite

from pdserve.core.blocks import BlockHash
from pdserve.core.errors import PdserveError, from_wire
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.core.shards import KVPart, KVShard
from pdserve.core.ticket import (
    DIGEST_BYTES,
    Departure,
    HandoffDone,
    KVSource,
    Lent,
    RegionReady,
    TicketGone,
    TransferTicket,
)
from pdserve.rpc.convert.fields import join_hashes, require, split_hashes
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb

_MAX_RANKS = 1024
_MAX_PARTS = 4096


def ticket_to_proto(ticket: TransferTicket) -> pb.TransferTicket:
    return pb.TransferTicket(
        id=ticket.id,
        request_id=ticket.request_id,
        engine_id=ticket.engine_id,
        epoch=ticket.epoch,
        address=ticket.address,
        layout_hash=ticket.layout_hash,
        num_tokens=ticket.num_tokens,
        block_size=ticket.block_size,
        lease=ticket.lease,
        ranks=[shard_to_proto(shard) for shard in ticket.ranks],
        growth=ticket.growth,
    )


def ticket_from_proto(message: pb.TransferTicket) -> TransferTicket:
    require(message.num_tokens > 0 and message.block_size > 0, "a ticket covers tokens, in blocks of at least one")
    require(isfinite(message.lease) and message.lease > 0, "a ticket's lease is a time ahead")
    return TransferTicket(
        id=message.id,
        request_id=message.request_id,
        engine_id=message.engine_id,
        epoch=message.epoch,
        address=message.address,
        layout_hash=message.layout_hash,
        num_tokens=message.num_tokens,
        block_size=message.block_size,
        lease=message.lease,
        ranks=_of_different_ranks(tuple(map(shard_from_proto, message.ranks))),
        growth=message.growth,
    )


def departure_to_proto(request_id: str, answer: Departure | PdserveError) -> pb.Departure:
    if isinstance(answer, PdserveError):
        return pb.Departure(request_id=request_id, error_code=answer.code, error_message=str(answer))
    return pb.Departure(
        request_id=request_id, ticket=ticket_to_proto(answer.ticket), output_token_ids=answer.output_token_ids
    )


def departure_from_proto(message: pb.Departure) -> Departure | PdserveError:
    if message.error_code:
        return from_wire(message.error_code, message.error_message)
    require(message.ticket.growth > 0, "the ticket of a running sequence leaves it room to grow")
    return Departure(ticket=ticket_from_proto(message.ticket), output_token_ids=tuple(message.output_token_ids))


def source_to_proto(source: KVSource) -> pb.KVSource:
    return pb.KVSource(**asdict(source))


def source_from_proto(message: pb.KVSource) -> KVSource:
    require(message.num_blocks > 0, "a source of KV holds at least one block")
    return KVSource(
        engine_id=message.engine_id,
        epoch=message.epoch,
        address=message.address,
        num_blocks=message.num_blocks,
        least_blocks=message.least_blocks,
    )


def shard_to_proto(shard: KVShard) -> pb.KVShard:
    return pb.KVShard(
        rank=shard.rank,
        first_layer=shard.layers[0],
        end_layer=shard.layers[1],
        first_head=shard.heads[0],
        end_head=shard.heads[1],
    )


def shard_from_proto(message: pb.KVShard) -> KVShard:
    require(message.first_layer < message.end_layer, "a rank holds at least one layer")
    require(message.first_head < message.end_head, "a rank holds at least one head")
    return KVShard(
        rank=message.rank,
        layers=(message.first_layer, message.end_layer),
        heads=(message.first_head, message.end_head),
    )


def _of_different_ranks(shards: tuple[KVShard, ...]) -> tuple[KVShard, ...]:
    require(len(shards) <= _MAX_RANKS, f"an engine has at most {_MAX_RANKS} ranks")
    require(len({shard.rank for shard in shards}) == len(shards), "each rank is named once")
    return shards


def part_to_proto(part: KVPart) -> pb.KVPart:
    return pb.KVPart(
        source_rank=part.source_rank,
        target_rank=part.target_rank,
        first_head=part.heads[0],
        end_head=part.heads[1],
    )


def part_from_proto(message: pb.KVPart) -> KVPart:
    require(message.first_head < message.end_head, "a part has at least one head")
    return KVPart(
        source_rank=message.source_rank,
        target_rank=message.target_rank,
        heads=(message.first_head, message.end_head),
    )


def parts_from_proto(messages: Sequence[pb.KVPart]) -> tuple[KVPart, ...]:
    """Of an Attach or a Lend."""
    require(len(messages) <= _MAX_PARTS, f"a target asks for at most {_MAX_PARTS} parts")
    return tuple(map(part_from_proto, messages))


def region_to_proto(region: RegionReady) -> pb.RegionReady:
    return pb.RegionReady(
        ticket_id=region.ticket_id,
        first_block=region.first_block,
        source_blocks=region.source_blocks,
        digest=region.digest,
        part=part_to_proto(region.part) if region.part else None,
    )


def region_from_proto(message: pb.RegionReady) -> RegionReady:
    require(len(message.source_blocks) > 0, "a region has at least one block")
    require(len(message.digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes")
    return RegionReady(
        ticket_id=message.ticket_id,
        first_block=message.first_block,
        source_blocks=tuple(message.source_blocks),
        digest=message.digest,
        part=part_from_proto(message.part) if message.HasField("part") else None,
    )


def done_to_proto(done: HandoffDone) -> pb.HandoffDone:
    return pb.HandoffDone(ticket_id=done.ticket_id, tokens=done.tokens, finished=done.finished)


def done_from_proto(message: pb.HandoffDone) -> HandoffDone:
    require(len(message.tokens) > 0, "a source that is done has sampled at least one token")
    return HandoffDone(ticket_id=message.ticket_id, tokens=tuple(message.tokens), finished=message.finished)


def gone_to_proto(gone: TicketGone) -> pb.TicketGone:
    return pb.TicketGone(ticket_id=gone.ticket_id, code=gone.code, message=gone.message)


def gone_from_proto(message: pb.TicketGone) -> TicketGone:
    return TicketGone(ticket_id=message.ticket_id, code=message.code, message=message.message)


def lend_to_proto(ticket_id: str, hashes: Sequence[BlockHash], parts: Sequence[KVPart]) -> pb.Lend:
    return pb.Lend(ticket_id=ticket_id, hashes=join_hashes(hashes), parts=[part_to_proto(part) for part in parts])


def lend_from_proto(message: pb.Lend) -> tuple[tuple[BlockHash, ...], tuple[KVPart, ...]]:
    """(hashes, parts)."""
    require(len(message.hashes) > 0, "a reader asks for at least one block")
    return split_hashes(message.hashes), parts_from_proto(message.parts)


def lent_to_proto(lent: Lent) -> pb.Lent:
    return pb.Lent(ticket_id=lent.ticket_id, num_blocks=lent.num_blocks, restore_seconds=lent.restore_seconds)


def lent_from_proto(message: pb.Lent) -> Lent:
    require(message.num_blocks > 0, "a loan is of at least one block")
    require(isfinite(message.restore_seconds) and message.restore_seconds >= 0, "a restore takes a finite time")
    return Lent(ticket_id=message.ticket_id, num_blocks=message.num_blocks, restore_seconds=message.restore_seconds)


def peer_to_proto(peer: PeerAddress) -> pb.PeerHello:
    return pb.PeerHello(
        engine_id=peer.engine_id,
        epoch=peer.epoch,
        layout_hash=peer.layout_hash,
        ranks=[
            pb.RankAddress(
                shard=shard_to_proto(rank.shard),
                backends=[pb.BackendMetadata(name=name, metadata=metadata) for name, metadata in rank.backends],
            )
            for rank in peer.ranks
        ],
    )


def peer_from_proto(message: pb.PeerHello) -> PeerAddress:
    shards = _of_different_ranks(tuple(shard_from_proto(rank.shard) for rank in message.ranks))
    return PeerAddress(
        engine_id=message.engine_id,
        epoch=message.epoch,
        layout_hash=message.layout_hash,
        ranks=tuple(
            RankAddress(
                shard=shard,
                backends=tuple((backend.name, backend.metadata) for backend in rank.backends),
            )
            for shard, rank in zip(shards, message.ranks, strict=True)
        ),
    )
