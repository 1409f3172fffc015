"""What an engine and its worker process say to each other: length-prefixed msgpack over a socket pair.

The engine sends commands; a command with a reply number is answered once, by an Answer of that number.
"""

import asyncio
import struct
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdserve.core.batch import Batch
from pdserve.core.blocks import BlockHash
from pdserve.core.errors import MalformedMessage, PdserveError, from_wire
from pdserve.core.layout import KVLayout
from pdserve.core.msgpack import unpack
from pdserve.core.protocols import ModelInfo, PeerAddress, PullSpec
from pdserve.core.shards import KVPart
from pdserve.core.tiers import SavedBlock
from pdserve.worker.spec import WorkerSpec

MAX_FRAME_BYTES = 1 << 28
VALUE_ERROR = "value_error"
"""Code of a ValueError: the caller broke the contract."""

_T = TypeVar("_T")
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {}
_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag=True, frozen=True):
    """First command; answered with Started."""

    reply: int
    spec: WorkerSpec


class Forward(msgspec.Struct, tag=True, frozen=True):
    batch: Batch


class Sample(msgspec.Struct, tag=True, frozen=True):
    """Answered with the step's StepOutput."""

    reply: int
    step: int
    masks: tuple[bytes | None, ...] | None


class Connect(msgspec.Struct, tag=True, frozen=True):
    """Answered with the backend's name."""

    reply: int
    peer: PeerAddress


class Disconnect(msgspec.Struct, tag=True, frozen=True):
    reply: int
    engine_id: str


class Digest(msgspec.Struct, tag=True, frozen=True):
    """Answered with the 16 bytes."""

    reply: int
    blocks: tuple[int, ...]
    num_tokens: int
    seed: int
    part: KVPart | None


class Fill(msgspec.Struct, tag=True, frozen=True):
    reply: int
    blocks: tuple[int, ...]
    seed: int


class GetFacts(msgspec.Struct, tag=True, frozen=True):
    """Answered with MachineFacts."""

    reply: int


class GetWireBytes(msgspec.Struct, tag=True, frozen=True):
    """Answered with WireBytes."""

    reply: int


class BeginPull(msgspec.Struct, tag=True, frozen=True):
    """Answered with the PullReceipt; `settled` is answered when the target blocks are nobody's any more."""

    reply: int
    settled: int
    spec: PullSpec


class CancelPull(msgspec.Struct, tag=True, frozen=True):
    """Names the pull by its BeginPull's reply number."""

    pull: int


class GetStats(msgspec.Struct, tag=True, frozen=True):
    """Answered with TransferStats."""

    reply: int


class GetTierContents(msgspec.Struct, tag=True, frozen=True):
    """Answered with TierNews. This and the next two only to a worker with tiers."""

    reply: int


class SaveBlocks(msgspec.Struct, tag=True, frozen=True):
    """Answered with TierNews once nobody reads the blocks any more and what is wrong is deleted."""

    reply: int
    blocks: tuple[SavedBlock, ...]
    used: tuple[BlockHash, ...]
    wrong: tuple[BlockHash, ...]


class RestoreBlocks(msgspec.Struct, tag=True, frozen=True):
    """Answered with the RestoreReceipt once nobody writes into the blocks any more."""

    reply: int
    hashes: tuple[BlockHash, ...]
    blocks: tuple[int, ...]


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Answered with nothing, at once: the process lives."""

    reply: int


class Close(msgspec.Struct, tag=True, frozen=True):
    """The process frees everything and ends."""


CheckCommand = Fill | GetFacts | GetWireBytes
TierCommand = GetTierContents | SaveBlocks | RestoreBlocks
Command = (
    Start
    | Forward
    | Sample
    | Connect
    | Disconnect
    | Digest
    | BeginPull
    | CancelPull
    | GetStats
    | CheckCommand
    | TierCommand
    | Ping
    | Close
)


class Started(msgspec.Struct, frozen=True):
    info: ModelInfo
    layout: KVLayout
    address: PeerAddress
    has_tiers: bool


class Answer(msgspec.Struct, frozen=True):
    """error is (code, message); value is set when it is None."""

    reply: int
    value: msgspec.Raw
    error: tuple[str, str] | None = None


def decode(data: bytes | msgspec.Raw, frame_type: type[_T]) -> _T:
    """Raises MalformedMessage for anything but a frame_type."""
    if frame_type not in _DECODERS:
        _DECODERS[frame_type] = msgspec.msgpack.Decoder(frame_type, dec_hook=_decode_other)
    decoder: msgspec.msgpack.Decoder[_T] = _DECODERS[frame_type]
    return unpack(data, decoder)


def decode_command(data: bytes) -> Command:
    """Raises MalformedMessage for anything but a command."""
    return unpack(data, _COMMAND)


def answer(reply: int, value: Any) -> Answer:
    return Answer(reply, msgspec.Raw(_encode(value)))


def failure(reply: int, error: Exception) -> Answer:
    if isinstance(error, PdserveError):
        code = error.code
    elif isinstance(error, ValueError):
        code = VALUE_ERROR
    else:
        code = PdserveError.code
    return Answer(reply, msgspec.Raw(_encode(None)), (code, str(error) or type(error).__name__))


def error_of(code: str, message: str) -> Exception:
    return ValueError(message) if code == VALUE_ERROR else from_wire(code, message)


def write_frame(writer: asyncio.StreamWriter, frame: msgspec.Struct) -> None:
    """Queue a frame; drops it once the writer closes. What is under way is bounded by the callers: two steps, and
    pulls into owned blocks."""
    # asyncio drops what is written then, but uvloop, on which engines run, raises RuntimeError.
    if not writer.is_closing():
        writer.write(framed(frame))


def framed(frame: msgspec.Struct) -> bytes:
    """As it goes over the socket."""
    data = _encode(frame)
    return _LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next frame's msgpack; None when the other side is gone. Raises MalformedMessage on an absurd length."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise MalformedMessage(f"a frame of {length} bytes cannot be right")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None


def _encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=_encode_other)


def _encode_other(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"a {type(value).__name__} cannot cross to another process")


def _decode_other(target: type, value: Any) -> Any:
    if target is Path:
        return Path(value)
    raise NotImplementedError(f"a {target.__name__} cannot cross from another process")


_COMMAND: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=_decode_other)
