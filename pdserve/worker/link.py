"""The engine's end of the conversation with its worker process."""

import asyncio
import socket
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from pdserve.config.times import Times
from pdserve.core.errors import EngineDied, MalformedMessage
from pdserve.worker.frames import Answer, Close, Command, Ping, decode, error_of, read_frame, write_frame
from pdserve.worker.rank_process import REAP_DEADLINE, LocalProcess, RankProcess

CLOSE_DEADLINE = 5.0
"""Seconds a worker process gets to end by itself."""

_T = TypeVar("_T")


class WorkerLink:
    """Owns the process. Every future it gives out is answered, or fails with EngineDied when the process ends."""

    def __init__(self, process: RankProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._numbers = count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Any]] = {}
        self.death: EngineDied | None = None
        self._verdict = ""
        self._num_answers = 0
        self._watch: asyncio.Task[None] | None = None
        self._listener = asyncio.create_task(self._listen(), name=f"worker {process.pid}")

    @classmethod
    async def spawn(cls, threads: int, inherited: tuple[int, ...] = ()) -> "WorkerLink":
        """Start an empty worker process on this machine; threads and inherited as in LocalProcess.start."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = LocalProcess.start(theirs.fileno(), threads, inherited)
        return cls(process, *await asyncio.open_connection(sock=ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """Raises EngineDied when the process is gone."""
        if self.death is not None:
            raise self.death
        write_frame(self._writer, command)

    def expect(self, answer_type: type[_T]) -> "tuple[int, asyncio.Future[_T]]":
        """A reply number for a command, and the future of its answer, decoded as answer_type."""
        number = next(self._numbers)
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        # Looked at here, so that an answer nobody waits for any more is no error of the program.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self.death is not None:
            future.set_exception(self.death)
        else:
            self._waiting[number] = (future, answer_type)
        return number, future

    async def ask(self, command: Callable[[int], Command], answer_type: type[_T]) -> _T:
        """Send a command and wait for its answer, or for the end of the process; then EngineDied."""
        number, future = self.expect(answer_type)
        self.send(command(number))
        return await asyncio.shield(future)

    async def call(self, command: Callable[[int], Command], answer_type: type[_T], deadline: float) -> _T:
        """Ask, but wait at most deadline seconds; then EngineDied. The process obeys even so, so this is not for what
        writes into blocks."""
        try:
            async with asyncio.timeout(deadline):
                return await self.ask(command, answer_type)
        except TimeoutError:
            raise EngineDied(f"the worker process {self.pid} did not answer within {deadline:g} s") from None

    def watch(self, times: Times) -> None:
        """Kill the process when it answers nothing for times.fence seconds: a frozen one would hold its engine's
        requests until the step's deadline."""
        self._watch = asyncio.create_task(self._fence_when_silent(times), name=f"watch of worker {self.pid}")

    async def ended(self) -> EngineDied:
        """Wait until the process is gone; how it ended."""
        await asyncio.wait({self._listener})
        assert self.death is not None
        return self.death

    def kill(self) -> None:
        """End the process at once. Does nothing when it is gone."""
        if self.death is None:
            self._process.kill()

    async def close(self) -> None:
        """Let the process end; kill it when it does not within CLOSE_DEADLINE."""
        if self._watch:
            self._watch.cancel()
        if self.death is None:
            self.send(Close())
        await asyncio.wait({self._listener}, timeout=CLOSE_DEADLINE)
        if not self._listener.done():
            self._process.kill()
            await asyncio.wait({self._listener}, timeout=REAP_DEADLINE)

    async def _fence_when_silent(self, times: Times) -> None:
        """Silence is counted in looks, not by the clock: when this process itself was stopped for a while, its
        worker is not to blame. Any answer ends it: a worker that is always late is slow, not frozen."""
        interval = times.heartbeat / 2
        patience = max(1, round(times.fence / interval) - 1)
        silent = 0
        while self.death is None and silent < patience:
            heard = self._num_answers
            number, answered = self.expect(type(None))
            self.send(Ping(number))
            await asyncio.wait({answered}, timeout=interval)
            silent = silent + 1 if self._num_answers == heard else 0
            if answered.done():
                await asyncio.sleep(interval)
        if self.death is None:
            self._verdict = f"answered nothing for {times.fence:g} s and "
            self.kill()

    async def _listen(self) -> None:
        try:
            while (frame := await read_frame(self._reader)) is not None:
                self._deliver(decode(frame, Answer))
        except MalformedMessage as error:
            self._verdict = f"answered nonsense ({error}) and "
        finally:
            self._writer.close()
            how = await self._process.gone()
            self._fail_all(EngineDied(f"the worker process {self.pid} {self._verdict}{how}"))

    def _deliver(self, reply: Answer) -> None:
        """Raises MalformedMessage, and leaves whoever waits to the end of the process."""
        if reply.reply not in self._waiting:
            raise MalformedMessage(f"nobody asked number {reply.reply}")
        self._num_answers += 1
        future, answer_type = self._waiting[reply.reply]
        value = decode(reply.value, answer_type) if reply.error is None else None
        del self._waiting[reply.reply]
        if future.done():
            return
        if reply.error is not None:
            future.set_exception(error_of(*reply.error))
        else:
            future.set_result(value)

    def _fail_all(self, death: EngineDied) -> None:
        self.death = death
        if self._watch:
            self._watch.cancel()
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(death)
