"""What a peer's bytes meet first: one function of bytes per parser, and valid examples to start from.

A target returns for bytes it accepts and raises PdserveError for bytes it refuses; anything else is a defect.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError, Message

from pdserve.core.batch import Batch, Row, SamplerInit, StepOutput
from pdserve.core.blocks import KVEvent, KVEventKind, KVSnapshot
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineState, LoadSnapshot, Role, StepTally
from pdserve.core.errors import Unavailable, from_wire
from pdserve.core.msgpack import unpack
from pdserve.core.protocols import ModelInfo, PeerAddress, PullReceipt, PullSpec, RankAddress
from pdserve.core.request import EngineTrace, FinishReason, PrefixFetch, Request, SamplingParams
from pdserve.core.shards import KVPart, KVShard
from pdserve.core.ticket import Departure, HandoffDone, KVSource, Lent, RegionReady, TicketGone, TransferTicket
from pdserve.core.token_delta import TokenDelta
from pdserve.rpc import convert
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from pdserve.rpc.generated.pdserve.v1 import kv_pb2
from pdserve.transfer import grpc_stream, two_sided
from pdserve.transfer.lanes import OFFER
from pdserve.transfer.memory import HEADER_BYTES, HostMemory
from pdserve.transfer.nixl import PEER_MEMORY
from pdserve.transfer.pair_control import Ask, Granted, Hello, Welcome
from pdserve.transfer.shared_memory import SharedMemoryBackend
from pdserve.transfer.spans import spans_fit
from pdserve.worker import frames
from pdserve.worker.spec import WorkerSpec
from tests.kv_layouts import kv_layout

Target = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """A parser under test and messages it accepts."""

    target: Target
    examples: tuple[bytes, ...]


def _protobuf(message_type: type[Message], *parts: tuple[str, Callable[[Any], object]]) -> Target:
    """Parse a message as gRPC does, then convert what it carries: parts are (field, or "" for the message
    itself; its `…_from_proto`)."""

    def target(data: bytes) -> None:
        message: Any = message_type()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return  # gRPC ends the call: nothing of ours sees the bytes
        for field, parse in parts:
            if not field:
                parse(message)
            elif message.HasField(field):
                parse(getattr(message, field))

    return target


def _ticket(message: pb.TransferTicket) -> None:
    assert convert.ticket_from_proto(message).num_blocks > 0


def _attach(message: pb.Attach) -> None:
    convert.parts_from_proto(message.parts)


def _gone(message: pb.TicketGone) -> None:
    gone = convert.gone_from_proto(message)
    from_wire(gone.code, gone.message)


def _steps(message: pb.StepEvent) -> None:
    for delta in message.deltas:
        convert.delta_from_proto(delta)


def _endpoints(message: pb.EndpointSet) -> None:
    for endpoint in message.endpoints:
        convert.endpoint_from_proto(endpoint)


def _command(data: bytes) -> None:
    frames.decode_command(data)


def _start(data: bytes) -> None:
    frames.decode(data, frames.Start)


def _answer(data: bytes) -> None:
    """An answer's value is decoded as what its command asked for; the number stands in for the command."""
    reply = frames.decode(data, frames.Answer)
    if reply.error is not None:
        frames.error_of(*reply.error)
        return
    types: tuple[Any, ...] = (frames.Started, StepOutput, str, bytes, PullReceipt, type(None))
    frames.decode(reply.value, types[reply.reply % len(types)])


def _shared_memory(data: bytes) -> None:
    backend = SharedMemoryBackend()
    backend.connect("peer/1", data)
    backend.close()


def _nixl(data: bytes) -> None:
    unpack(data, PEER_MEMORY)


def _offer(data: bytes) -> None:
    assert unpack(data, OFFER).num_blocks > 0


def _pair_control(data: bytes) -> None:
    """The first byte stands in for what is awaited on the line."""
    kind = (Hello, Welcome, Ask, Granted)[data[0] % 4] if data else Hello
    frame: Any = unpack(data[1:], msgspec.msgpack.Decoder(kind))
    if isinstance(frame, Ask):
        spans_fit(HEADER_BYTES, *frame.spans())


def _two_sided(data: bytes) -> None:
    unpack(data, two_sided.PEER_SERVER)


def _grpc_stream(data: bytes) -> None:
    unpack(data, grpc_stream.PEER_SERVER).request([1], [2])


def _read_spans(message: kv_pb2.ReadSpans) -> None:
    spans_fit(HEADER_BYTES, np.array(message.offsets, dtype=np.uint64), np.array(message.lengths, dtype=np.uint64))


_SHARD = KVShard(rank=0, layers=(0, 4), heads=(0, 2))
_PART = KVPart(source_rank=0, target_rank=1, heads=(1, 2))
_TICKET = TransferTicket(
    id="ticket-0",
    request_id="r",
    engine_id="prefill-0",
    epoch=2**64 - 1,
    address="10.0.0.1:4000",
    layout_hash=bytes(range(16)),
    num_tokens=33,
    block_size=16,
    lease=10.0,
    ranks=(_SHARD,),
)
_DEPARTURE = Departure(ticket=replace(_TICKET, growth=9), output_token_ids=(5,))
_REQUEST = Request(id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(seed=5, stop_token_ids=(2,)))
_DELTA = TokenDelta(
    request_id="r",
    index=3,
    token_ids=(7,),
    logprobs=(-0.5,),
    finish_reason=FinishReason.STOP,
    error=("transfer_failed", "no"),
    trace=EngineTrace(
        engine_id="d",
        epoch=3,
        cached_tokens=16,
        stamps=(("queued", 1e9),),
        fetch=PrefixFetch(engine_id="p", tokens=16, num_bytes=9, seconds=0.1, backend="nixl"),
    ),
)
_LOAD = LoadSnapshot(
    engine_id="d",
    epoch=3,
    number=9,
    running=1,
    waiting=0,
    backlog_tokens=0,
    blocks=BlockCounts(total=8, free=5, used=1, leased=1, quarantined=1),
    draining=False,
    steps=(StepTally(steps=1, tokens=2, context=3, seconds=0.1),),
)
_PEER = PeerAddress(
    engine_id="p",
    epoch=4,
    layout_hash=bytes(16),
    ranks=(RankAddress(shard=_SHARD, backends=(("nixl", b"\x01\x02"),)),),
)
_ENDPOINT = Endpoint(engine_id="p", role=Role.PREFILL, epoch=1, address="10.0.0.1:4000", pid=9, state=EngineState.READY)
_REGION = RegionReady(ticket_id="ticket-0", first_block=1, source_blocks=(4, 9), digest=bytes(16), part=_PART)
_ROW = Row(
    sequence_id=1,
    start=0,
    num_tokens=2,
    token_ids=(1, 2),
    block_ids=(3,),
    sample=True,
    sampler=SamplerInit(seed=1, prompt_len=2, seen_token_ids=(1, 2)),
)
_PULL = PullSpec(
    peer="p",
    epoch=4,
    source_blocks=(1,),
    target_blocks=(2,),
    digest=bytes(16),
    seed=3,
    deadline=10.0,
    start_within=10.0,
    part=_PART,
)
_INFO = ModelInfo(name="m", revision="r", vocab_size=9, max_model_len=9, eos_token_ids=(0,))


def _session_events() -> tuple[bytes, ...]:
    events = (KVEvent(number=1, kind=KVEventKind.STORED, hashes=(bytes(16),)),)
    snapshot = KVSnapshot(number=1, hashes=(bytes(16), bytes(range(16))), first=True, last=True)
    description = pb.EngineDescription(
        engine_id="p", role="prefill", epoch=1, block_size=16, num_blocks=8, max_rows=4, max_tokens_per_step=64
    )
    return tuple(
        event.SerializeToString()
        for event in (
            pb.SessionEvent(description=description),
            pb.SessionEvent(step=pb.StepEvent(epoch=1, deltas=[convert.delta_to_proto(_DELTA)])),
            pb.SessionEvent(load=convert.load_to_proto(_LOAD)),
            pb.SessionEvent(ticket=convert.ticket_to_proto(_TICKET)),
            pb.SessionEvent(departure=convert.departure_to_proto("r", _DEPARTURE)),
            pb.SessionEvent(departure=convert.departure_to_proto("r", Unavailable("it has ended"))),
            pb.SessionEvent(kv_events=convert.kv_events_to_proto(1, events)),
            pb.SessionEvent(kv_snapshot=convert.kv_snapshot_to_proto(1, snapshot)),
        )
    )


def _session_commands() -> tuple[bytes, ...]:
    submit = pb.Submit(
        request=convert.request_to_proto(_REQUEST), handoff=False, ticket=convert.ticket_to_proto(_TICKET)
    )
    source = KVSource(engine_id="d", epoch=3, address="10.0.0.1:4000", num_blocks=4, least_blocks=2)
    fetching = pb.Submit(request=convert.request_to_proto(_REQUEST), source=convert.source_to_proto(source))
    return submit.SerializeToString(), fetching.SerializeToString()


def _handoff_events() -> tuple[bytes, ...]:
    done = HandoffDone(ticket_id="ticket-0", tokens=(5,), finished=False)
    gone = TicketGone(ticket_id="ticket-0", code="lease_expired", message="too late")
    return tuple(
        event.SerializeToString()
        for event in (
            pb.HandoffEvent(source_epoch=1, region=convert.region_to_proto(_REGION)),
            pb.HandoffEvent(source_epoch=1, done=convert.done_to_proto(done)),
            pb.HandoffEvent(source_epoch=1, gone=convert.gone_to_proto(gone)),
            pb.HandoffEvent(source_epoch=1, lent=convert.lent_to_proto(Lent(ticket_id="ticket-0", num_blocks=2))),
            pb.HandoffEvent(source_epoch=1, released=pb.Released(ticket_id="ticket-0", expired=True)),
        )
    )


def _frame(frame: Any) -> bytes:
    return msgspec.msgpack.encode(frame, enc_hook=str)


_COMMANDS = (
    frames.Forward(Batch(step=1, rows=(_ROW,), released=(4,))),
    frames.Sample(1, 1, (None, b"\x01")),
    frames.Connect(2, _PEER),
    frames.Disconnect(3, "p"),
    frames.Digest(4, (1, 2), 20, 99, _PART),
    frames.BeginPull(5, 6, _PULL),
    frames.CancelPull(5),
    frames.Fill(7, (1, 2), 2**64 - 1),
    frames.GetFacts(7),
    frames.GetWireBytes(7),
    frames.GetTierContents(8),
    frames.SaveBlocks(9, ((bytes(16), 1),), (bytes(16),), (bytes(16),)),
    frames.RestoreBlocks(10, (bytes(16),), (2,)),
    frames.Close(),
)
_ANSWERS = (
    frames.answer(0, frames.Started(_INFO, kv_layout(), _PEER, has_tiers=True)),
    frames.answer(1, StepOutput(step=1, rows=())),
    frames.answer(2, "nixl"),
    frames.answer(3, bytes(16)),
    frames.answer(4, PullReceipt(backend="nixl", num_bytes=1, wire_seconds=0.1, verify_seconds=0.1)),
    frames.failure(5, ValueError("no")),
)
_SPEC = WorkerSpec(model=Path("/m"), engine_id="p", epoch=1, num_blocks=8)


def _shared_memory_example() -> bytes:
    backend = SharedMemoryBackend()
    backend.register(_MEMORY)
    return backend.metadata()


_MEMORY = HostMemory(HEADER_BYTES)

TARGETS: dict[str, Fuzzed] = {
    "frame_command": Fuzzed(_command, tuple(map(_frame, _COMMANDS))),
    "frame_start": Fuzzed(_start, (_frame(frames.Start(1, _SPEC)),)),
    "frame_answer": Fuzzed(_answer, tuple(map(_frame, _ANSWERS))),
    "submit": Fuzzed(
        _protobuf(
            pb.Submit,
            ("request", convert.request_from_proto),
            ("ticket", _ticket),
            ("source", convert.source_from_proto),
        ),
        _session_commands(),
    ),
    "session_event": Fuzzed(
        _protobuf(
            pb.SessionEvent,
            ("description", convert.capacity_from_proto),
            ("step", _steps),
            ("load", convert.load_from_proto),
            ("ticket", _ticket),
            ("kv_events", convert.kv_events_from_proto),
            ("kv_snapshot", convert.kv_snapshot_from_proto),
            ("departure", convert.departure_from_proto),
        ),
        _session_events(),
    ),
    "handoff_command": Fuzzed(
        _protobuf(pb.HandoffCommand, ("attach", _attach), ("lend", convert.lend_from_proto)),
        (
            pb.HandoffCommand(
                source_epoch=1, lend=convert.lend_to_proto("ticket-0", (bytes(16),), (_PART,))
            ).SerializeToString(),
            pb.HandoffCommand(
                source_epoch=1,
                attach=pb.Attach(ticket_id="ticket-0", first_block=1, parts=[convert.part_to_proto(_PART)]),
            ).SerializeToString(),
        ),
    ),
    "handoff_event": Fuzzed(
        _protobuf(
            pb.HandoffEvent,
            ("region", convert.region_from_proto),
            ("done", convert.done_from_proto),
            ("gone", _gone),
            ("lent", convert.lent_from_proto),
        ),
        _handoff_events(),
    ),
    "peer_hello": Fuzzed(
        _protobuf(pb.PeerHello, ("", convert.peer_from_proto)), (convert.peer_to_proto(_PEER).SerializeToString(),)
    ),
    "endpoint_set": Fuzzed(
        _protobuf(pb.EndpointSet, ("", _endpoints)),
        (pb.EndpointSet(number=1, endpoints=[convert.endpoint_to_proto(_ENDPOINT)]).SerializeToString(),),
    ),
    "shared_memory_metadata": Fuzzed(_shared_memory, (_shared_memory_example(),)),
    "nixl_metadata": Fuzzed(
        _nixl,
        (msgspec.msgpack.encode({"agent": b"a", "kind": "host", "address": 4096, "nbytes": 64, "device_id": 0}),),
    ),
    "pair_control": Fuzzed(
        _pair_control,
        tuple(
            bytes([number]) + msgspec.msgpack.encode(frame)
            for number, frame in enumerate(
                (Hello(3, bytes(16)), Welcome(4000, 1 << 20), Ask(bytes(8), bytes(8)), Granted())
            )
        ),
    ),
    "two_sided_metadata": Fuzzed(
        _two_sided, (msgspec.msgpack.encode(two_sided.PeerServer("10.0.0.1", 4000, 3, bytes(16))),)
    ),
    "grpc_metadata": Fuzzed(
        _grpc_stream, (msgspec.msgpack.encode(grpc_stream.PeerServer("10.0.0.1:4000", 3, bytes(16))),)
    ),
    "read_spans": Fuzzed(
        _protobuf(kv_pb2.ReadSpans, ("", _read_spans)),
        (kv_pb2.ReadSpans(source_epoch=3, token=bytes(16), offsets=[0, 64], lengths=[64, 64]).SerializeToString(),),
    ),
    "backend_offer": Fuzzed(
        _offer,
        (msgspec.msgpack.encode({"num_blocks": 8, "order": "block_major", "digest": "xxh3_128", "metadata": b"m"}),),
    ),
}
