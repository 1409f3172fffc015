"""Fields of messages that several of them have, and how what breaks the protocol is refused."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from pdserve.core.blocks import HASH_BYTES, BlockHash
from pdserve.core.errors import MalformedMessage

_K = TypeVar("_K")
_V = TypeVar("_V")


def join_hashes(hashes: Iterable[BlockHash]) -> bytes:
    return b"".join(hashes)


def split_hashes(joined: bytes) -> tuple[BlockHash, ...]:
    require(len(joined) % HASH_BYTES == 0, f"block hashes have {HASH_BYTES} bytes each")
    return tuple(joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES))


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise MalformedMessage(f"a peer broke the protocol: {rule}")


def known(values: Mapping[_K, _V], key: _K, what: str) -> _V:
    if key not in values:
        raise MalformedMessage(f"a peer named a {what} that this version does not know: {key!r}")
    return values[key]
