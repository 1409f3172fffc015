"""What engines tell of themselves: capacity, load, prefix caches, and that they exist."""

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite

from pdserve.core.blocks import KVEvent, KVEventKind, KVSnapshot
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineCapacity, EngineState, LoadSnapshot, Role, StepTally
from pdserve.core.tiers import Tier, TierTally
from pdserve.rpc.convert.fields import join_hashes, known, require, split_hashes
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb

_ROLES = {role.value: role for role in Role}
_STATES = {state.value: state for state in EngineState}
_TIERS = {tier.value: tier for tier in Tier}


def load_to_proto(load: LoadSnapshot) -> pb.LoadSnapshot:
    blocks = load.blocks
    return pb.LoadSnapshot(
        engine_id=load.engine_id,
        epoch=load.epoch,
        number=load.number,
        running=load.running,
        waiting=load.waiting,
        fetching=load.fetching,
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
        drain_cause=load.drain_cause,
    )


def load_from_proto(message: pb.LoadSnapshot) -> LoadSnapshot:
    require(all(isfinite(tally.seconds) for tally in message.steps), "steps take a finite time")
    blocks = message.blocks
    return LoadSnapshot(
        engine_id=message.engine_id,
        epoch=message.epoch,
        number=message.number,
        running=message.running,
        waiting=message.waiting,
        fetching=message.fetching,
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
        drain_cause=message.drain_cause,
    )


def _tier_from_proto(message: pb.TierTally) -> TierTally:
    require(isfinite(message.seconds_per_block), "a restore takes a finite time")
    return TierTally(
        tier=known(_TIERS, message.tier, "tier"),
        capacity=message.capacity,
        blocks=message.blocks,
        saved_bytes=message.saved_bytes,
        restored_blocks=message.restored_blocks,
        restored_bytes=message.restored_bytes,
        evicted=message.evicted,
        refused=message.refused,
        corrupt=message.corrupt,
        failed=message.failed,
        seconds_per_block=message.seconds_per_block,
    )


def capacity_from_proto(message: pb.EngineDescription) -> EngineCapacity:
    sizes = (message.block_size, message.num_blocks, message.max_rows, message.max_tokens_per_step)
    require(min(sizes) > 0, "an engine has blocks, rows and tokens to offer")
    return EngineCapacity(
        model_revision=message.model_revision,
        block_size=message.block_size,
        num_blocks=message.num_blocks,
        max_rows=message.max_rows,
        max_tokens_per_step=message.max_tokens_per_step,
        prefix_caching=message.prefix_caching,
        max_len=message.max_model_len or None,
        numerics=message.numerics,
        domain=message.domain,
    )


_KV_KINDS: dict[KVEventKind, pb.KVChange.Kind] = {
    KVEventKind.STORED: pb.KVChange.KIND_STORED,
    KVEventKind.REMOVED: pb.KVChange.KIND_REMOVED,
    KVEventKind.CLEARED: pb.KVChange.KIND_CLEARED,
}

_FROM_KV_KINDS = {number: kind for kind, number in _KV_KINDS.items()}


def kv_events_to_proto(epoch: int, events: Sequence[KVEvent]) -> pb.KVEvents:
    """Events with consecutive numbers, at least one."""
    changes = [
        pb.KVChange(kind=_KV_KINDS[event.kind], hashes=join_hashes(event.hashes), tier=event.tier or "")
        for event in events
    ]
    return pb.KVEvents(epoch=epoch, first_number=events[0].number, changes=changes)


def kv_events_from_proto(message: pb.KVEvents) -> list[KVEvent]:
    return [
        KVEvent(
            number=number,
            kind=known(_FROM_KV_KINDS, change.kind, "kind of KV event"),
            hashes=split_hashes(change.hashes),
            tier=_place(change.tier),
        )
        for number, change in enumerate(message.changes, message.first_number)
    ]


def kv_snapshot_to_proto(epoch: int, snapshot: KVSnapshot) -> pb.KVSnapshot:
    return pb.KVSnapshot(
        epoch=epoch,
        number=snapshot.number,
        hashes=join_hashes(snapshot.hashes),
        first=snapshot.first,
        last=snapshot.last,
        tier=snapshot.tier or "",
    )


def kv_snapshot_from_proto(message: pb.KVSnapshot) -> KVSnapshot:
    return KVSnapshot(
        number=message.number,
        hashes=split_hashes(message.hashes),
        first=message.first,
        last=message.last,
        tier=_place(message.tier),
    )


def _place(tier: str) -> Tier | None:
    """Where a block lies; empty is the device pool."""
    return known(_TIERS, tier, "tier") if tier else None


def endpoint_to_proto(endpoint: Endpoint) -> pb.Endpoint:
    return pb.Endpoint(
        engine_id=endpoint.engine_id,
        role=endpoint.role.value,
        epoch=endpoint.epoch,
        address=endpoint.address,
        pid=endpoint.pid,
        state=endpoint.state.value,
    )


def described_endpoint(message: pb.EngineDescription, address: str) -> Endpoint:
    """The engine that describes itself at an address."""
    require(bool(message.engine_id and message.epoch), "an engine has a name and an epoch")
    return Endpoint(
        engine_id=message.engine_id,
        role=known(_ROLES, message.role, "role"),
        epoch=message.epoch,
        address=address,
        pid=message.pid,
        state=EngineState.READY,
    )


def endpoint_from_proto(message: pb.Endpoint) -> Endpoint:
    return Endpoint(
        engine_id=message.engine_id,
        role=known(_ROLES, message.role, "role"),
        epoch=message.epoch,
        address=message.address,
        pid=message.pid,
        state=known(_STATES, message.state, "engine state"),
    )
