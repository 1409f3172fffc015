"""Messages of protos/pdserve/v1/engine.proto ↔ core types. The only module that knows both.

Every `…_from_proto` takes whatever a peer can send and raises PdserveError for what is no such value:
InvalidRequest where it is a client's, MalformedMessage otherwise.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import TypeVar

from pdserve.core.blocks import HASH_BYTES, BlockHash, KVEvent, KVEventKind, KVSnapshot
from pdserve.core.endpoint import (
    BlockCounts,
    Endpoint,
    EngineCapacity,
    EngineState,
    LoadSnapshot,
    Role,
    StepTally,
)
from pdserve.core.errors import MalformedMessage
from pdserve.core.protocols import PeerAddress, RankAddress
from pdserve.core.request import EngineTrace, FinishReason, Request, SamplingParams, TokenDelta
from pdserve.core.shards import KVPart, KVShard
from pdserve.core.ticket import DIGEST_BYTES, PrefillDone, RegionReady, TicketGone, TransferTicket
from pdserve.core.tiers import Tier, TierTally
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb

_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
_ROLES = {role.value: role for role in Role}
_STATES = {state.value: state for state in EngineState}
_TIERS = {tier.value: tier for tier in Tier}

_MAX_RANKS = 1024
_MAX_PARTS = 4096

_K = TypeVar("_K")
_V = TypeVar("_V")


def request_to_proto(request: Request) -> pb.Request:
    """Stop strings stay behind: only the gateway's detokenizer decides them."""
    s = request.sampling
    if s.seed is None:
        raise ValueError("a request leaves the gateway with its seed fixed")
    return pb.Request(
        id=request.id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=pb.SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=s.stop_token_ids,
            ignore_eos=s.ignore_eos,
            logprobs=s.logprobs,
        ),
        salt=request.salt,
        timeout=request.timeout,
        sample_index=request.sample_index,
    )


def request_from_proto(message: pb.Request) -> Request:
    s = message.sampling
    return Request(
        id=message.id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=tuple(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            logprobs=s.logprobs,
        ),
        salt=message.salt,
        timeout=message.timeout,
        sample_index=message.sample_index,
    )


def delta_to_proto(delta: TokenDelta) -> pb.TokenDelta:
    code, text = delta.error or ("", "")
    return pb.TokenDelta(
        request_id=delta.request_id,
        index=delta.index,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs or (),
        finish_reason=delta.finish_reason.value if delta.finish_reason else "",
        error_code=code,
        error_message=text,
        trace=trace_to_proto(delta.trace) if delta.trace else None,
    )


def delta_from_proto(message: pb.TokenDelta) -> TokenDelta:
    return TokenDelta(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs) or None,
        finish_reason=_known(_FINISH_REASONS, message.finish_reason, "finish reason")
        if message.finish_reason
        else None,
        error=(message.error_code, message.error_message) if message.error_code else None,
        trace=trace_from_proto(message.trace) if message.HasField("trace") else None,
    )


def trace_to_proto(trace: EngineTrace) -> pb.EngineTrace:
    return pb.EngineTrace(
        engine_id=trace.engine_id,
        epoch=trace.epoch,
        cached_tokens=trace.cached_tokens,
        stamps=[pb.Stamp(name=name, unix_seconds=unix) for name, unix in trace.stamps],
        transfer_backend=trace.transfer_backend,
        transfer_bytes=trace.transfer_bytes,
        transfer_pulls=trace.transfer_pulls,
        transfer_mode=trace.transfer_mode,
        transfer_forecast=[pb.NamedSeconds(name=name, seconds=s) for name, s in trace.transfer_forecast],
        transfer_stages=[pb.NamedSeconds(name=name, seconds=s) for name, s in trace.transfer_stages],
        transfer_failovers=[pb.Failover(backend=name, code=code) for name, code in trace.transfer_failovers],
    )


def trace_from_proto(message: pb.EngineTrace) -> EngineTrace:
    return EngineTrace(
        engine_id=message.engine_id,
        epoch=message.epoch,
        cached_tokens=message.cached_tokens,
        stamps=tuple((stamp.name, stamp.unix_seconds) for stamp in message.stamps),
        transfer_backend=message.transfer_backend,
        transfer_bytes=message.transfer_bytes,
        transfer_pulls=message.transfer_pulls,
        transfer_mode=message.transfer_mode,
        transfer_forecast=tuple((entry.name, entry.seconds) for entry in message.transfer_forecast),
        transfer_stages=tuple((entry.name, entry.seconds) for entry in message.transfer_stages),
        transfer_failovers=tuple((entry.backend, entry.code) for entry in message.transfer_failovers),
    )


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
    )


def ticket_from_proto(message: pb.TransferTicket) -> TransferTicket:
    _require(message.num_tokens > 0 and message.block_size > 0, "a ticket covers tokens, in blocks of at least one")
    _require(isfinite(message.lease) and message.lease > 0, "a ticket's lease is a time ahead")
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
    _require(message.first_layer < message.end_layer, "a rank holds at least one layer")
    _require(message.first_head < message.end_head, "a rank holds at least one head")
    return KVShard(
        rank=message.rank,
        layers=(message.first_layer, message.end_layer),
        heads=(message.first_head, message.end_head),
    )


def _of_different_ranks(shards: tuple[KVShard, ...]) -> tuple[KVShard, ...]:
    _require(len(shards) <= _MAX_RANKS, f"an engine has at most {_MAX_RANKS} ranks")
    _require(len({shard.rank for shard in shards}) == len(shards), "each rank is named once")
    return shards


def part_to_proto(part: KVPart) -> pb.KVPart:
    return pb.KVPart(
        source_rank=part.source_rank,
        target_rank=part.target_rank,
        first_head=part.heads[0],
        end_head=part.heads[1],
    )


def part_from_proto(message: pb.KVPart) -> KVPart:
    _require(message.first_head < message.end_head, "a part has at least one head")
    return KVPart(
        source_rank=message.source_rank,
        target_rank=message.target_rank,
        heads=(message.first_head, message.end_head),
    )


def parts_from_proto(messages: Sequence[pb.KVPart]) -> tuple[KVPart, ...]:
    """Of an Attach."""
    _require(len(messages) <= _MAX_PARTS, f"a target asks for at most {_MAX_PARTS} parts")
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
    _require(len(message.source_blocks) > 0, "a region has at least one block")
    _require(len(message.digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes")
    return RegionReady(
        ticket_id=message.ticket_id,
        first_block=message.first_block,
        source_blocks=tuple(message.source_blocks),
        digest=message.digest,
        part=part_from_proto(message.part) if message.HasField("part") else None,
    )


def done_to_proto(done: PrefillDone) -> pb.PrefillDone:
    return pb.PrefillDone(ticket_id=done.ticket_id, first_token=done.first_token, finished=done.finished)


def done_from_proto(message: pb.PrefillDone) -> PrefillDone:
    return PrefillDone(ticket_id=message.ticket_id, first_token=message.first_token, finished=message.finished)


def gone_to_proto(gone: TicketGone) -> pb.TicketGone:
    return pb.TicketGone(ticket_id=gone.ticket_id, code=gone.code, message=gone.message)


def gone_from_proto(message: pb.TicketGone) -> TicketGone:
    return TicketGone(ticket_id=message.ticket_id, code=message.code, message=message.message)


def load_to_proto(load: LoadSnapshot) -> pb.LoadSnapshot:
    blocks = load.blocks
    return pb.LoadSnapshot(
        engine_id=load.engine_id,
        epoch=load.epoch,
        number=load.number,
        running=load.running,
        waiting=load.waiting,
        backlog_tokens=load.backlog_tokens,
        blocks=pb.BlockCounts(
            total=blocks.total,
            free=blocks.free,
            used=blocks.used,
            leased=blocks.leased,
            quarantined=blocks.quarantined,
        ),
        draining=load.draining,
        steps=[
            pb.StepTally(steps=tally.steps, tokens=tally.tokens, context=tally.context, seconds=tally.seconds)
            for tally in load.steps
        ],
        tiers=[pb.TierTally(**asdict(tally)) for tally in load.tiers],
    )


def load_from_proto(message: pb.LoadSnapshot) -> LoadSnapshot:
    _require(all(isfinite(tally.seconds) for tally in message.steps), "steps take a finite time")
    blocks = message.blocks
    return LoadSnapshot(
        engine_id=message.engine_id,
        epoch=message.epoch,
        number=message.number,
        running=message.running,
        waiting=message.waiting,
        backlog_tokens=message.backlog_tokens,
        blocks=BlockCounts(
            total=blocks.total,
            free=blocks.free,
            used=blocks.used,
            leased=blocks.leased,
            quarantined=blocks.quarantined,
        ),
        draining=message.draining,
        steps=tuple(
            StepTally(steps=tally.steps, tokens=tally.tokens, context=tally.context, seconds=tally.seconds)
            for tally in message.steps
        ),
        tiers=tuple(_tier_from_proto(tally) for tally in message.tiers),
    )


def _tier_from_proto(message: pb.TierTally) -> TierTally:
    return TierTally(
        tier=_known(_TIERS, message.tier, "tier"),
        capacity=message.capacity,
        blocks=message.blocks,
        saved_bytes=message.saved_bytes,
        restored_blocks=message.restored_blocks,
        restored_bytes=message.restored_bytes,
        evicted=message.evicted,
        refused=message.refused,
        corrupt=message.corrupt,
        failed=message.failed,
    )


def capacity_from_proto(message: pb.EngineDescription) -> EngineCapacity:
    sizes = (message.block_size, message.num_blocks, message.max_rows, message.max_tokens_per_step)
    _require(min(sizes) > 0, "an engine has blocks, rows and tokens to offer")
    return EngineCapacity(
        model_revision=message.model_revision,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        max_rows=message.max_rows,
        max_tokens_per_step=message.max_tokens_per_step,
        prefix_caching=message.prefix_caching,
    )


_KV_KINDS: dict[KVEventKind, pb.KVChange.Kind] = {
    KVEventKind.STORED: pb.KVChange.KIND_STORED,
    KVEventKind.REMOVED: pb.KVChange.KIND_REMOVED,
    KVEventKind.CLEARED: pb.KVChange.KIND_CLEARED,
}
_FROM_KV_KINDS = {number: kind for kind, number in _KV_KINDS.items()}


def kv_events_to_proto(epoch: int, events: Sequence[KVEvent]) -> pb.KVEvents:
    """Events with consecutive numbers, at least one."""
    changes = [pb.KVChange(kind=_KV_KINDS[event.kind], hashes=_joined(event.hashes)) for event in events]
    return pb.KVEvents(epoch=epoch, first_number=events[0].number, changes=changes)


def kv_events_from_proto(message: pb.KVEvents) -> list[KVEvent]:
    return [
        KVEvent(
            number=number, kind=_known(_FROM_KV_KINDS, change.kind, "kind of KV event"), hashes=_split(change.hashes)
        )
        for number, change in enumerate(message.changes, message.first_number)
    ]


def kv_snapshot_to_proto(epoch: int, snapshot: KVSnapshot) -> pb.KVSnapshot:
    return pb.KVSnapshot(
        epoch=epoch,
        number=snapshot.number,
        hashes=_joined(snapshot.hashes),
        first=snapshot.first,
        last=snapshot.last,
    )


def kv_snapshot_from_proto(message: pb.KVSnapshot) -> KVSnapshot:
    return KVSnapshot(number=message.number, hashes=_split(message.hashes), first=message.first, last=message.last)


def _joined(hashes: Iterable[BlockHash]) -> bytes:
    return b"".join(hashes)


def _split(joined: bytes) -> tuple[BlockHash, ...]:
    _require(len(joined) % HASH_BYTES == 0, f"block hashes have {HASH_BYTES} bytes each")
    return tuple(joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES))


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


def endpoint_to_proto(endpoint: Endpoint) -> pb.Endpoint:
    return pb.Endpoint(
        engine_id=endpoint.engine_id,
        role=endpoint.role.value,
        epoch=endpoint.epoch,
        address=endpoint.address,
        pid=endpoint.pid,
        state=endpoint.state.value,
    )


def endpoint_from_proto(message: pb.Endpoint) -> Endpoint:
    return Endpoint(
        engine_id=message.engine_id,
        role=_known(_ROLES, message.role, "role"),
        epoch=message.epoch,
        address=message.address,
        pid=message.pid,
        state=_known(_STATES, message.state, "engine state"),
    )


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise MalformedMessage(f"a peer broke the protocol: {rule}")


def _known(values: Mapping[_K, _V], key: _K, what: str) -> _V:
    if key not in values:
        raise MalformedMessage(f"a peer named a {what} that this version does not know: {key!r}")
    return values[key]
