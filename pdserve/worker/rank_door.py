"""Where the hosts of an engine's ranks come to, on other machines: the engine's end of worker.rank_host."""

import asyncio
import socket
from contextlib import suppress
from importlib.metadata import version

import structlog

from pdserve.core.errors import EngineDied, MalformedMessage
from pdserve.core.exit_code import manner_of_end
from pdserve.core.keepalive import keep_watch
from pdserve.worker.frames import decode, read_frame, write_frame
from pdserve.worker.hosting import Duty, Introduction, KillRank, RankEnded, RankHere, hear
from pdserve.worker.link import WorkerLink
from pdserve.worker.rank_process import LINGER_DEADLINE

HOST_DEADLINE = 2.0
"""Seconds a host gets to end a rank and say so. One that is lost with its machine says nothing; the kernel would take
four seconds more to find out."""

_log = structlog.get_logger(__name__)


class RankDoor:
    """Listens on behalf of one incarnation of an engine. Open with `open`.

    Of hosts machines the engine's own is number 0, which has the first ranks; each of the others gets as many."""

    def __init__(self, hosts: int, ranks: int, threads: int) -> None:
        self._hosts = hosts
        self._threads = threads
        self.ranks_each = ranks // hosts
        self._lines: dict[int, _HostLine] = {}
        self._links: dict[int, asyncio.Future[WorkerLink]] = {}
        self._server: asyncio.Server | None = None

    @classmethod
    async def open(cls, listener: socket.socket, *, hosts: int, ranks: int, threads: int) -> "RankDoor":
        """The listening socket is the door's from now on. threads are those of each rank."""
        door = cls(hosts, ranks, threads)
        door._links = {rank: asyncio.get_running_loop().create_future() for rank in range(door.ranks_each, ranks)}
        door._server = await asyncio.start_server(door._meet, sock=listener)
        return door

    async def meet(self, rank: int, deadline: float) -> WorkerLink:
        """The link to a rank elsewhere. Raises EngineDied when its host has not come within deadline seconds."""
        try:
            async with asyncio.timeout(deadline):
                return await asyncio.shield(self._links[rank])
        except TimeoutError:
            number = rank // self.ranks_each
            raise EngineDied(f"host {number} of {self._hosts} did not come within {deadline:g} s") from None

    def address(self, rank: int) -> str:
        """Of the host of a rank that was met."""
        return self._lines[rank // self.ranks_each].address

    async def close(self) -> None:
        """Hosts end what ranks they still have."""
        if self._server:
            self._server.close()
        for link in self._links.values():
            link.cancel()
        for line in self._lines.values():
            line.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whoever says something else than what belongs here is hung up on."""
        keep_watch(writer.get_extra_info("socket"))
        try:
            match await hear(reader, Introduction | RankHere):  # type: ignore[arg-type]  # a union is no type
                case Introduction() as host:
                    await self._take_on(host, reader, writer)
                    return
                case RankHere() as here if self._expects(here.rank):
                    line = self._lines[here.rank // self.ranks_each]
                    process = _DistantProcess(line, here, writer)
                    self._links[here.rank].set_result(WorkerLink(process, reader, writer))
                    return
        except (MalformedMessage, OSError, TimeoutError) as error:
            _log.warning("hung up on somebody at the door of an engine's ranks", cause=str(error))
        writer.close()

    def _expects(self, rank: int) -> bool:
        return rank in self._links and not self._links[rank].done() and rank // self.ranks_each in self._lines

    async def _take_on(self, host: Introduction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if refusal := self._refusal(host):
            write_frame(writer, Duty(refusal=refusal))
            with suppress(OSError):
                await writer.drain()
            writer.close()
            return
        first = host.number * self.ranks_each
        ranks = tuple(range(first, first + self.ranks_each))
        line = self._lines[host.number] = _HostLine(host.address, ranks, writer)
        write_frame(writer, Duty(ranks=ranks, threads=self._threads))
        await line.listen(reader)

    def _refusal(self, host: Introduction) -> str:
        """Why it is not taken on; empty if it is."""
        ours = version("pdserve")
        if host.version != ours:
            return f"it has pdserve {host.version} and the engine {ours}; install the same version on all hosts"
        if not 0 < host.number < self._hosts:
            return f"its number is {host.number}, and of {self._hosts} hosts those that dial are 1 to {self._hosts - 1}"
        if host.number in self._lines:
            return f"this incarnation of the engine has, or has had, a host {host.number}"
        return ""


class _HostLine:
    """The connection a host keeps for as long as its ranks run."""

    def __init__(self, address: str, ranks: tuple[int, ...], writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._writer = writer
        self._codes: dict[int, asyncio.Future[int | None]] = {
            rank: asyncio.get_running_loop().create_future() for rank in ranks
        }
        """None: lost with its machine."""
        self._killed: set[int] = set()

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Until either side hangs up."""
        try:
            while (frame := await read_frame(reader)) is not None:
                ended = decode(frame, RankEnded)
                if (code := self._codes.get(ended.rank)) and not code.done():
                    code.set_result(ended.code)
        except MalformedMessage as error:
            _log.warning("a host of ranks talks nonsense", address=self.address, cause=str(error))
        finally:
            self.close()

    def kill(self, rank: int) -> None:
        if not self._codes[rank].done() and rank not in self._killed:
            self._killed.add(rank)
            write_frame(self._writer, KillRank(rank))

    async def gone(self, rank: int) -> str:
        """How a rank that has closed its connection ended."""
        if rank not in self._killed:
            await asyncio.wait({self._codes[rank]}, timeout=LINGER_DEADLINE)
            self.kill(rank)
        await asyncio.wait({self._codes[rank]}, timeout=HOST_DEADLINE)
        if not self._codes[rank].done():
            return f"on {self.address} is lost: its host answers nothing"
        code = self._codes[rank].result()
        return f"on {self.address} " + ("was lost with its host" if code is None else manner_of_end(code))

    def close(self) -> None:
        self._writer.close()
        for code in self._codes.values():
            if not code.done():
                code.set_result(None)


class _DistantProcess:
    """RankProcess on another machine, whose own connection writer is."""

    def __init__(self, line: _HostLine, here: RankHere, writer: asyncio.StreamWriter) -> None:
        self._line = line
        self._here = here
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._here.pid

    def kill(self) -> None:
        self._line.kill(self._here.rank)
        # Also where nobody is left to obey.
        self._writer.transport.abort()

    async def gone(self) -> str:
        return await self._line.gone(self._here.rank)
