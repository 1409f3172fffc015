"""Parsers of peers' bytes accept or refuse, and never do anything else; inputs that once broke one are kept here."""

import random
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import InvalidRequest, MalformedMessage, PdserveError
from pdserve.rpc import convert
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb
from tests.fuzz.targets import TARGETS

NAMES = sorted(TARGETS)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_accepted(name: str) -> None:
    for example in TARGETS[name].examples:
        TARGETS[name].target(example)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), data=st.binary(max_size=200))
def test_any_bytes_are_accepted_or_refused_by_name(name: str, data: bytes) -> None:
    with suppress(PdserveError):
        TARGETS[name].target(data)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**32))
def test_messages_with_a_few_bytes_changed_are_accepted_or_refused_by_name(name: str, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(chance.choice(TARGETS[name].examples))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at : at + chance.randint(1, 4)]
            case 2:
                data[at:at] = chance.randbytes(chance.randint(1, 4))
        data = data or bytearray(b"\0")
    with suppress(PdserveError):
        TARGETS[name].target(bytes(data))


def frame_with(key: bytes) -> bytes:
    return b"\x82" + bytes([0xA0 + len(key)]) + key + b"\x01\xa5reply\x01"


BROKE_ONCE = [
    ("frame_answer", frame_with(b"r\xce\xce")),  # no UTF-8 in a field's name
    ("frame_start", frame_with(b"\xff\xff")),
    ("frame_command", frame_with(b"\x83")),
    ("shared_memory_metadata", frame_with(b"\xe2\x28")),
    ("nixl_metadata", frame_with(b"\xe2\x28")),
    ("backend_offer", frame_with(b"\xe2\x28")),
    ("shared_memory_metadata", msgspec.msgpack.encode({"pid": 1, "fd": 0, "nbytes": 2**63, "nonce": bytes(16)})),
    ("shared_memory_metadata", msgspec.msgpack.encode({"pid": 1, "fd": 0, "nbytes": -5000, "nonce": bytes(16)})),
    (
        "nixl_metadata",
        msgspec.msgpack.encode({"agent": b"a", "kind": "host", "address": -1, "nbytes": 1, "device_id": 0}),
    ),
    ("two_sided_metadata", frame_with(b"\xe2\x28")),
    ("two_sided_metadata", msgspec.msgpack.encode({"host": "h", "port": 2**16, "epoch": 1, "token": b""})),
    ("grpc_metadata", msgspec.msgpack.encode({"address": "a", "epoch": -1, "token": b""})),
    ("pair_control", b"\2" + msgspec.msgpack.encode({"offsets": bytes(7), "lengths": bytes(8)})),
    (
        "backend_offer",
        msgspec.msgpack.encode({"num_blocks": 0, "order": "block_major", "digest": "xxh3_128", "metadata": b""}),
    ),
    (
        "backend_offer",
        msgspec.msgpack.encode({"num_blocks": 2**40, "order": "block_major", "digest": "xxh3_128", "metadata": b""}),
    ),
    (
        "session_event",
        pb.SessionEvent(step=pb.StepEvent(deltas=[pb.TokenDelta(finish_reason="x")])).SerializeToString(),
    ),
    ("session_event", pb.SessionEvent(kv_events=pb.KVEvents(changes=[pb.KVChange(kind=9)])).SerializeToString()),  # type: ignore[arg-type]
    ("session_event", pb.SessionEvent(kv_snapshot=pb.KVSnapshot(hashes=bytes(17))).SerializeToString()),
    ("session_event", pb.SessionEvent(description=pb.EngineDescription(num_blocks=8)).SerializeToString()),
    ("session_event", pb.SessionEvent(ticket=pb.TransferTicket(num_tokens=3, lease=1.0)).SerializeToString()),
    (
        "session_event",
        pb.SessionEvent(
            departure=pb.Departure(ticket=pb.TransferTicket(num_tokens=3, block_size=2, lease=1.0))
        ).SerializeToString(),
    ),
    ("handoff_event", pb.HandoffEvent(done=pb.HandoffDone(ticket_id="t")).SerializeToString()),
    ("submit", pb.Submit(ticket=pb.TransferTicket(num_tokens=3, block_size=2, lease=float("nan"))).SerializeToString()),
    ("handoff_event", pb.HandoffEvent(region=pb.RegionReady(ticket_id="t", digest=bytes(16))).SerializeToString()),
    ("handoff_event", pb.HandoffEvent(region=pb.RegionReady(source_blocks=[1], digest=b"")).SerializeToString()),
    ("endpoint_set", pb.EndpointSet(endpoints=[pb.Endpoint(role="x", state="ready")]).SerializeToString()),
    ("endpoint_set", pb.EndpointSet(endpoints=[pb.Endpoint(role="decode", state="x")]).SerializeToString()),
]


@pytest.mark.parametrize(("name", "data"), BROKE_ONCE)
def test_what_broke_a_parser_once_is_refused_as_malformed(name: str, data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        TARGETS[name].target(data)


def test_a_deadline_that_is_no_number_is_refused_before_it_can_disorder_the_others() -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        convert.request_from_proto(
            pb.Request(
                prompt_token_ids=[1],
                sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1),
                timeout=float("nan"),
            )
        )
