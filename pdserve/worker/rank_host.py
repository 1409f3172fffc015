"""Starts ranks of an engine whose own process is on another machine (worker.rank_door), and ends them with it."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

import structlog

from pdserve.core.errors import MalformedMessage, PdserveError, Unavailable
from pdserve.core.keepalive import keep_watch
from pdserve.worker.frames import decode, framed, read_frame, write_frame
from pdserve.worker.hosting import (
    ANSWER_DEADLINE,
    Duty,
    Introduction,
    KillRank,
    RankEnded,
    RankHere,
    hear,
    split_address,
)
from pdserve.worker.rank_process import REAP_DEADLINE, worker_command, worker_environment

_REDIAL = 0.5
"""Seconds after the engine was not there, or has left."""

_log = structlog.get_logger(__name__)


class RankHost:
    """Serves the incarnations of one engine, one after the other, for as long as its machine stays. The name of another
    machine's engine may come to be that of a new one, while this host waits to be replaced, too: it does not follow."""

    def __init__(self, leader: str, number: int, address: str) -> None:
        """leader: the engine's door, host:port. number: as in Introduction, and address. Raises MalformedMessage."""
        self._leader = split_address(leader)
        self._number = number
        self._address = address
        self._machine = ""
        """The address at which it has first served."""
        self._told = ""
        self.serves = False
        """Whether ranks run here."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until stop is set and the engine, which drains first, has left. Cancelled, it ends the ranks."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                await self._until_left(stopping)
                await asyncio.wait({stopping}, timeout=_REDIAL)
        finally:
            stopping.cancel()

    async def _until_left(self, stopping: "asyncio.Task[bool]") -> None:
        """One incarnation; without one no longer than until it is to stop."""
        incarnation = asyncio.create_task(self._try())
        try:
            await asyncio.wait({incarnation, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if self.serves:
                await asyncio.wait({incarnation})
        finally:
            incarnation.cancel()
            await asyncio.gather(incarnation, return_exceptions=True)

    async def _try(self) -> None:
        try:
            await self.serve()
        except (OSError, TimeoutError, PdserveError) as error:
            if str(error) != self._told:
                self._told = str(error)
                _log.warning("no engine to start ranks for yet, dialling again", leader=self._leader, cause=self._told)

    async def serve(self, on_start: Callable[[], None] = lambda: None) -> None:
        """One incarnation, which is there already, to its end. on_start is called once its ranks are started, which may
        still refuse what they are to load.

        Raises Unavailable when the engine will not have this host, OSError, TimeoutError or MalformedMessage when it
        does not behave as one."""
        async with asyncio.timeout(ANSWER_DEADLINE):
            reader, writer = await asyncio.open_connection(*self._leader)
        ranks: dict[int, asyncio.subprocess.Process] = {}
        try:
            door = writer.get_extra_info("peername")
            if self._machine not in ("", door[0]):
                raise Unavailable(f"the engine is at {door[0]} now and was at {self._machine}; start this host anew")
            keep_watch(writer.get_extra_info("socket"))
            write_frame(writer, Introduction(self._number, self._address, version("pdserve")))
            duty = await hear(reader, Duty)
            if duty.refusal:
                raise Unavailable(duty.refusal)
            self.serves, self._machine = True, door[0]
            for rank in duty.ranks:
                ranks[rank] = await _start(rank, duty.threads, door)
            self._told = ""
            on_start()
            _log.info("started ranks", leader=self._leader, ranks=duty.ranks)
            await _obey(reader, writer, ranks)
            _log.info("the engine has left, its ranks end", leader=self._leader)
        finally:
            writer.close()
            await _end(ranks)
            self.serves = False


async def _start(rank: int, threads: int, door: tuple[str, int]) -> asyncio.subprocess.Process:
    """The rank meets the engine on a connection of its own."""
    loop = asyncio.get_running_loop()
    with socket.socket() as line:
        line.setblocking(False)
        keep_watch(line)
        async with asyncio.timeout(ANSWER_DEADLINE):
            await loop.sock_connect(line, door)
        process = await asyncio.create_subprocess_exec(
            *worker_command(line.fileno()),
            pass_fds=(line.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,
            env=worker_environment(threads),
        )
        async with asyncio.timeout(ANSWER_DEADLINE):
            await loop.sock_sendall(line, framed(RankHere(rank, process.pid)))
    return process


async def _obey(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ranks: dict[int, asyncio.subprocess.Process]
) -> None:
    """Kill what is to be killed, and tell what has ended, until the engine hangs up. Raises MalformedMessage."""
    watches = [asyncio.create_task(_tell_end(writer, rank, process)) for rank, process in ranks.items()]
    try:
        while (frame := await read_frame(reader)) is not None:
            if (process := ranks.get(decode(frame, KillRank).rank)) is None:
                raise MalformedMessage("the engine wants a rank killed that is not here")
            _kill(process)
    finally:
        for watch in watches:
            watch.cancel()


async def _tell_end(writer: asyncio.StreamWriter, rank: int, process: asyncio.subprocess.Process) -> None:
    write_frame(writer, RankEnded(rank, await process.wait()))


async def _end(ranks: dict[int, asyncio.subprocess.Process]) -> None:
    for process in ranks.values():
        _kill(process)
    with suppress(TimeoutError):
        async with asyncio.timeout(REAP_DEADLINE):
            await asyncio.gather(*(process.wait() for process in ranks.values()))


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
