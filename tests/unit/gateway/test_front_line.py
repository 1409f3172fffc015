"""The line between a front and its gateway: one frame per turn of the event loop, and no trust in what comes."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from pdserve.gateway.fronts import line as lines
from pdserve.gateway.fronts.line import Line

_NUMBERS = msgspec.msgpack.Decoder(list[int])


class End:
    """One end that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.lost = False
        self.line = Line[int, int](_NUMBERS, self.heard.append, self._lose)

    def _lose(self) -> None:
        self.lost = True


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[tuple[End, End]]:
    loop = asyncio.get_running_loop()
    here, there = End(), End()
    server = await loop.create_unix_server(lambda: there.line, str(path))
    await loop.create_unix_connection(lambda: here.line, str(path))
    there.line.say(-1)
    await heard(here, 1)
    try:
        yield here, there
    finally:
        here.line.close()
        server.close()
        await asyncio.wait_for(asyncio.gather(here.line.closed, there.line.closed), 10)


async def heard(end: End, frames: int) -> None:
    async with asyncio.timeout(10):
        while len(end.heard) < frames:
            await asyncio.sleep(0.001)


async def test_what_is_said_in_one_turn_goes_out_as_one_frame(tmp_path: Path) -> None:
    async with connected(tmp_path / "s") as (here, there):
        for number in range(3):
            here.line.say(number)
        await heard(there, 1)
        here.line.say(3)
        await heard(there, 2)
        assert there.heard == [[0, 1, 2], [3]]


async def test_frames_that_come_in_pieces_or_together_are_heard_one_by_one(tmp_path: Path) -> None:
    async with connected(tmp_path / "s") as (here, there):
        frames = b"".join(struct.pack("<I", 2) + msgspec.msgpack.encode([number]) for number in range(3))
        for at in range(0, len(frames), 5):
            there.line.data_received(frames[at : at + 5])
        assert there.heard == [[0], [1], [2]]
        assert not here.lost


@pytest.mark.parametrize(
    "nonsense", [b"\xff\xff\xff\xff", struct.pack("<I", 1) + b"\xc1", struct.pack("<I", 1) + b"\x01"]
)
async def test_nonsense_ends_the_line(tmp_path: Path, nonsense: bytes) -> None:
    async with connected(tmp_path / "s") as (here, there):
        there.line.data_received(nonsense)
        async with asyncio.timeout(10):
            await here.line.closed
        assert here.lost
        assert there.lost


async def test_an_end_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_UNREAD_BYTES", 1000)
    async with connected(tmp_path / "s") as (here, there):
        assert there.line._transport is not None
        there.line._transport.pause_reading()
        for number in range(300_000):
            here.line.say(number)
        async with asyncio.timeout(10):
            await here.line.closed
        assert here.lost
        there.line._transport.resume_reading()
