"""The watch over a worker process, against a peer that answers when the test wants it to."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pdserve.config.times import Times
from pdserve.core.errors import EngineDied
from pdserve.worker.frames import Answer, Command, Ping, answer, decode_command, read_frame, write_frame
from pdserve.worker.link import WorkerLink
from pdserve.worker.rank_process import LocalProcess

TIMES = replace(Times(), heartbeat=0.2, fence=0.4)
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
INTERVAL = TIMES.heartbeat / 2
"""Between two looks at a worker; after three without a sign of life it is killed."""

Obey = Callable[[Command, Callable[[Answer], None]], None]


@asynccontextmanager
async def watched(obey: Obey) -> AsyncIterator[tuple[WorkerLink, "subprocess.Popen[bytes]"]]:
    """A watched link to a process that does nothing, for which `obey` answers over a socket of the test's."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(SLEEP)  # noqa: ASYNC220
    link = WorkerLink(LocalProcess(process), *await asyncio.open_connection(sock=ours))
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def serve() -> None:
        while (frame := await read_frame(reader)) is not None:
            obey(decode_command(frame), lambda reply: write_frame(writer, reply))

    serving = asyncio.create_task(serve())
    link.watch(TIMES)
    try:
        yield link, process
    finally:
        process.kill()
        writer.close()
        await link.close()
        serving.cancel()


async def test_a_worker_that_answers_every_ping_late_is_slow_and_not_frozen() -> None:
    def obey(command: Command, send: Callable[[Answer], None]) -> None:
        if isinstance(command, Ping):
            asyncio.get_running_loop().call_later(1.5 * INTERVAL, send, answer(command.reply, None))

    async with watched(obey) as (_, process):
        await asyncio.sleep(12 * INTERVAL)
        assert process.poll() is None


async def test_a_worker_that_answers_nothing_is_killed() -> None:
    async with watched(lambda command, send: None) as (link, process):
        number, answered = link.expect(type(None))
        link.send(Ping(number))
        async with asyncio.timeout(20):
            while process.poll() is None:
                await asyncio.sleep(0.01)
    with pytest.raises(EngineDied, match=r"answered nothing for 0\.4 s and was killed by SIGKILL"):
        await answered


class Unending(subprocess.Popen[bytes]):
    """A process whose end nobody lives to see, like one that hangs in a driver."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return super().wait()
        raise subprocess.TimeoutExpired(self.args, timeout)


async def test_whoever_waits_for_a_worker_that_cannot_be_ended_is_told() -> None:
    ours, theirs = socket.socketpair()
    process = Unending(SLEEP)
    link = WorkerLink(LocalProcess(process), *await asyncio.open_connection(sock=ours))
    _, answered = link.expect(type(None))
    theirs.close()
    with pytest.raises(EngineDied, match="was killed, but did not end within 5 s"):
        await asyncio.wait_for(answered, 20)
    await link.close()
    process.wait()
