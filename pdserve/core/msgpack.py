"""Reading msgpack that another process wrote, whatever it wrote."""

from typing import Annotated, TypeVar

import msgspec

from pdserve.core.errors import MalformedMessage

_T = TypeVar("_T")

Natural = Annotated[int, msgspec.Meta(ge=0)]
"""Field type: at most 64 bits, as every integer in msgpack, and not negative."""

Port = Annotated[int, msgspec.Meta(gt=0, lt=2**16)]


def unpack(data: bytes | msgspec.Raw, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    """Raises MalformedMessage for anything but a message of the decoder's type."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"these bytes are no {_name(decoder)}: {error}") from error


def _name(decoder: msgspec.msgpack.Decoder[_T]) -> str:
    return str(getattr(decoder.type, "__name__", "message"))
