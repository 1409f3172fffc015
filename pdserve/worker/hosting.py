"""What an engine and the hosts of its ranks say to each other, in frames as between an engine and a worker beside it.

A host dials the engine and introduces itself; the engine answers with the ranks it is to start. For each of them the
host dials once more and says which one it is; that connection is the worker's from then on. The first one stays: its
end is the end of the ranks.

Neither side proves who it is, and nor do ranks when they meet (gloo): the network between an engine's hosts must be
closed to others.
"""

import asyncio
from typing import TypeVar

import msgspec

from pdserve.core.errors import MalformedMessage
from pdserve.worker.frames import decode, read_frame

ANSWER_DEADLINE = 10.0
"""Seconds for the other side to say what is expected next."""

_T = TypeVar("_T")


class Introduction(msgspec.Struct, tag=True, frozen=True):
    """First word of a host: its number, from 1 on, and the address at which the others' ranks reach its own."""

    number: int
    address: str
    version: str


class Duty(msgspec.Struct, frozen=True):
    """The engine's answer: the ranks to start, each with so many threads; or why it will not have the host."""

    ranks: tuple[int, ...] = ()
    threads: int = 1
    refusal: str = ""


class RankHere(msgspec.Struct, tag=True, frozen=True):
    """First word on a rank's connection; the worker's own follow."""

    rank: int
    pid: int


class KillRank(msgspec.Struct, frozen=True):
    """To the host."""

    rank: int


class RankEnded(msgspec.Struct, frozen=True):
    """From the host; the exit code is negative for a signal."""

    rank: int
    code: int


async def hear(reader: asyncio.StreamReader, word: type[_T]) -> _T:
    """The next word, within ANSWER_DEADLINE. Raises MalformedMessage, ConnectionError at the end of the connection,
    TimeoutError."""
    async with asyncio.timeout(ANSWER_DEADLINE):
        frame = await read_frame(reader)
    if frame is None:
        raise ConnectionError("the other side has hung up")
    return decode(frame, word)


def split_address(address: str) -> tuple[str, int]:
    """host:port. Raises MalformedMessage."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise MalformedMessage(f"{address!r} is not host:port")
    return host, int(port)
