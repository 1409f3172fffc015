"""KV sources for the transfer suites: in this process, or in another one that can be killed or frozen."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdserve.core.layout import KVLayout
from pdserve.core.protocols import PeerAddress, PullSpec
from tests.contract.source_host import Command, Connect, CpuSeconds, Digest, Host, Open, Read, Write

ROOT = Path(__file__).parents[2]
ANSWER_DEADLINE = 30.0


class Driver(Protocol):
    """Something that answers a source host's commands."""

    async def ask(self, command: Command) -> Any: ...


class InProcess:
    def __init__(self) -> None:
        self._host = Host()

    async def ask(self, command: Command) -> Any:
        return msgspec.json.decode(msgspec.json.encode(await self._host.answer(command)))


class InChild:
    """A source host in its own process, started by the prefix. Killed with `end`; its stdout is kept for
    inspection."""

    def __init__(self, env: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_DEADLINE)
        self._stdout = os.memfd_create("stdout")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.contract.source_host", str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ | dict(env),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
        )
        theirs.close()
        self._lines = self._socket.makefile("rb")

    async def ask(self, command: Command) -> Any:
        return await asyncio.to_thread(self._ask, command)

    def _ask(self, command: Command) -> Any:
        self._socket.sendall(msgspec.json.encode(command) + b"\n")
        return msgspec.json.decode(self._lines.readline())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stdout(self) -> bytes:
        return os.pread(self._stdout, 1 << 16, 0)

    def end(self) -> None:
        """Kill and free everything; harmless when done before."""
        if self._socket.fileno() < 0:
            return
        self.process.kill()
        self.process.wait(ANSWER_DEADLINE)
        self._lines.close()
        self._socket.close()
        os.close(self._stdout)


class Source:
    """One opened memory of a host."""

    def __init__(self, driver: Driver, index: int, address: PeerAddress, layout: KVLayout, fill: int) -> None:
        self.driver, self._index, self.address, self.layout = driver, index, address, layout
        self.bytes: NDArray[np.uint8] = np.random.default_rng(fill).integers(0, 256, layout.total_bytes, dtype=np.uint8)
        """What the memory held when it was opened."""

    @classmethod
    async def open(cls, driver: Driver, command: Open) -> "Source":
        index, address = await driver.ask(command)
        return cls(driver, index, msgspec.convert(address, PeerAddress), command.layout, command.fill)

    async def digest(self, blocks: tuple[int, ...], num_tokens: int, seed: int) -> bytes:
        return msgspec.convert(await self.driver.ask(Digest(self._index, blocks, num_tokens, seed)), bytes)

    async def write(self, offset: int, data: bytes) -> None:
        await self.driver.ask(Write(self._index, offset, data))

    async def connect(self, peer: PeerAddress) -> None:
        await self.driver.ask(Connect(self._index, peer))

    async def read(self, spec: PullSpec) -> str:
        """The code of the error it ended with; empty when the bytes are there."""
        return str(await self.driver.ask(Read(self._index, spec)))

    async def cpu_seconds(self) -> float:
        return float(await self.driver.ask(CpuSeconds()))
