"""The worker process: `python -m pdserve.worker.remote_main SOCKET_FD PARENT_PID`. Lives no longer than its parent."""

import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable
from typing import Any

from pdserve.core.errors import EngineDied
from pdserve.core.pair_check import MachineFacts, WireBytes
from pdserve.core.parent_death import die_with_parent
from pdserve.core.protocols import CheckedTransfer, Pull, StepHandle
from pdserve.core.tiers import RestoreReceipt, TierNews, TierService
from pdserve.worker.frames import (
    Answer,
    BeginPull,
    CancelPull,
    CheckCommand,
    Close,
    Command,
    Connect,
    Digest,
    Disconnect,
    Fill,
    Forward,
    GetFacts,
    GetStats,
    GetTierContents,
    GetWireBytes,
    Ping,
    RestoreBlocks,
    Sample,
    SaveBlocks,
    Start,
    Started,
    TierCommand,
    answer,
    decode,
    decode_command,
    failure,
    read_frame,
    write_frame,
)
from pdserve.worker.local import LocalWorker


class Host:
    """Runs the commands of one engine on one worker, in order; waits for their results on the side."""

    def __init__(self, worker: LocalWorker, writer: asyncio.StreamWriter) -> None:
        self._worker = worker
        self._writer = writer
        self._steps: dict[int, StepHandle] = {}
        self._pulls: dict[int, Pull] = {}
        self._death: EngineDied | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, command: Command) -> None:
        match command:
            case Forward(batch):
                try:
                    self._steps[batch.step] = self._worker.executor.forward(batch)
                except EngineDied as error:
                    self._death = error
            case Sample(reply, step, masks):
                self._sample(reply, step, masks)
            case Connect() | Disconnect() | Digest() | Fill() | GetFacts() | GetWireBytes():
                self._answer_later(command.reply, _on_transfer(self._worker.transfer, command))
            case BeginPull():
                self._begin_pull(command)
            case CancelPull(number):
                if number in self._pulls:
                    self._pulls[number].cancel()
            case Ping(reply):
                self._send(answer(reply, None))
            case GetStats(reply):
                self._answer_later(reply, self._worker.transfer_stats())
            case GetTierContents() | SaveBlocks() | RestoreBlocks() if tiers := self._worker.tiers:
                self._answer_later(command.reply, _on_tiers(tiers, command))
            case _:
                raise ValueError(f"{type(command).__name__} is out of place")

    def _sample(self, reply: int, step: int, masks: tuple[bytes | None, ...] | None) -> None:
        handle = self._steps.pop(step, None)
        try:
            if handle is None:
                raise self._death or EngineDied(f"step {step} never reached the worker")
            self._worker.executor.sample(handle, masks)
        except EngineDied as error:
            self._send(failure(reply, error))
            return
        self._answer_later(reply, self._worker.executor.collect(handle))

    def _begin_pull(self, command: BeginPull) -> None:
        try:
            pull = self._worker.transfer.pull(command.spec)
        except ValueError as error:
            self._send(failure(command.reply, error))
            self._send(answer(command.settled, None))
            return
        self._pulls[command.reply] = pull
        self._answer_later(command.reply, pull.wait())
        self._keep(self._settle(command, pull))

    async def _settle(self, command: BeginPull, pull: Pull) -> None:
        await pull.settled()
        del self._pulls[command.reply]
        self._send(answer(command.settled, None))

    def _answer_later(self, reply: int, result: Awaitable[Any]) -> None:
        self._keep(self._answer(reply, result))

    async def _answer(self, reply: int, result: Awaitable[Any]) -> None:
        try:
            self._send(answer(reply, await result))
        except Exception as error:
            self._send(failure(reply, error))

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, frame: Answer) -> None:
        write_frame(self._writer, frame)


def _on_transfer(
    transfer: CheckedTransfer, command: Connect | Disconnect | Digest | CheckCommand
) -> Awaitable[str | bytes | MachineFacts | WireBytes | None]:
    match command:
        case Connect(_, peer):
            return transfer.connect(peer)
        case Disconnect(_, engine_id):
            return transfer.disconnect(engine_id)
        case Digest(_, blocks, num_tokens, seed, part):
            return transfer.digest(blocks, num_tokens, seed, part)
        case Fill(_, blocks, seed):
            return transfer.fill(blocks, seed)
        case GetFacts():
            return transfer.facts()
        case GetWireBytes():
            return transfer.wire_bytes()


def _on_tiers(tiers: TierService, command: TierCommand) -> Awaitable[TierNews | RestoreReceipt]:
    match command:
        case GetTierContents():
            return tiers.contents()
        case SaveBlocks(_, blocks, used, wrong):
            return tiers.save(blocks, used, wrong)
        case RestoreBlocks(_, hashes, blocks):
            return tiers.restore(hashes, blocks)


async def serve(fd: int) -> None:
    """Open the worker the first command asks for, then run commands until Close or the engine is gone."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    try:
        if (frame := await read_frame(reader)) is not None:
            await _serve(decode(frame, Start), reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


async def _serve(start: Start, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        worker = await LocalWorker.open(start.spec)
    except Exception as error:
        write_frame(writer, failure(start.reply, error))
        return
    write_frame(writer, answer(start.reply, _started(worker)))
    obeying = asyncio.create_task(_obey(reader, Host(worker, writer)))
    dying = asyncio.create_task(worker.transfer.death())
    try:
        done, _ = await asyncio.wait((obeying, dying), return_when=asyncio.FIRST_COMPLETED)
        if dying in done:
            raise dying.result()
        obeying.result()
    finally:
        for task in (obeying, dying):
            task.cancel()
        await worker.close()


async def _obey(reader: asyncio.StreamReader, host: Host) -> None:
    while (frame := await read_frame(reader)) is not None:
        command = decode_command(frame)
        if isinstance(command, Close):
            return
        host.run(command)


def _started(worker: LocalWorker) -> Started:
    return Started(worker.info, worker.layout, worker.transfer.address, has_tiers=worker.tiers is not None)


def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    # Ctrl-C reaches the whole terminal group; the engine drains first and then closes its worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(fd))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
