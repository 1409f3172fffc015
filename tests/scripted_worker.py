"""A worker process as its engine's link sees it, which answers and ends when a test says so."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pdserve.worker.frames import Command, Ping, answer, decode_command, failure, read_frame, write_frame
from pdserve.worker.link import WorkerLink


class ScriptedProcess:
    """Implements rank_process.RankProcess."""

    pid = 7

    def __init__(self) -> None:
        self.lingers = asyncio.Event()
        """It cannot be talked to any more, and nobody knows yet how it ended."""
        self._ended = asyncio.Event()

    def kill(self) -> None:
        self._ended.set()

    async def gone(self) -> str:
        self.lingers.set()
        await self._ended.wait()
        return "was killed by SIGKILL"


class ScriptedWorker:
    """Answers pings at once, everything else when told to."""

    def __init__(self, link: WorkerLink, process: ScriptedProcess, writer: asyncio.StreamWriter) -> None:
        self.link, self.process = link, process
        self.commands: asyncio.Queue[Command] = asyncio.Queue()
        self._writer = writer

    def answer(self, reply: int, value: Any) -> None:
        write_frame(self._writer, answer(reply, value))

    def fail(self, reply: int, error: Exception) -> None:
        write_frame(self._writer, failure(reply, error))

    def hang_up(self) -> None:
        self._writer.close()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            command = decode_command(frame)
            if isinstance(command, Ping):
                self.answer(command.reply, None)
            else:
                self.commands.put_nowait(command)


@asynccontextmanager
async def scripted_worker() -> AsyncIterator[ScriptedWorker]:
    ours, theirs = socket.socketpair()
    process = ScriptedProcess()
    link = WorkerLink(process, *await asyncio.open_connection(sock=ours))
    reader, writer = await asyncio.open_connection(sock=theirs)
    worker = ScriptedWorker(link, process, writer)
    serving = asyncio.create_task(worker.serve(reader))
    try:
        yield worker
    finally:
        process.kill()
        worker.hang_up()
        await link.close()
        await serving
