"""A worker's process, as its engine sees it: on this machine, or on another (worker.rank_door)."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import suppress
from typing import Protocol

from pdserve.core.exit_code import manner_of_end

LINGER_DEADLINE = 1.0
"""Seconds a process that closed its socket gets to be gone."""

REAP_DEADLINE = 5.0
"""Seconds the kernel gets to end a killed process."""


class RankProcess(Protocol):
    """Lives no longer than its engine."""

    @property
    def pid(self) -> int:
        """On the machine it runs on."""
        ...

    def kill(self) -> None:
        """End it at once. Does nothing when it is gone."""
        ...

    def gone(self) -> Awaitable[str]:
        """It cannot be talked to any more, so it ends now if it has not; how it ended, in words. Never longer than
        REAP_DEADLINE after it was killed: one that hangs in a driver is told as not ended."""
        ...


class LocalProcess:
    """A child of this process."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @classmethod
    def start(cls, fd: int, threads: int, inherited: tuple[int, ...] = ()) -> "LocalProcess":
        """An empty worker, which meets this process on the socket of that descriptor.

        threads are those of the libraries that read it from the environment; inherited are further descriptors it gets
        under the same numbers."""
        process = subprocess.Popen(
            worker_command(fd),
            pass_fds=(fd, *inherited),
            stdin=subprocess.DEVNULL,
            # The engine's stdout belongs to the engine; libraries that print in a worker reach its log.
            stdout=2,
            env=worker_environment(threads),
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    async def gone(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            return manner_of_end(await asyncio.to_thread(self._process.wait, LINGER_DEADLINE))
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            return manner_of_end(await asyncio.to_thread(self._process.wait, REAP_DEADLINE))
        return f"was killed, but did not end within {REAP_DEADLINE:g} s"


def worker_command(fd: int) -> tuple[str, ...]:
    """A worker that serves the socket of a descriptor and is this process's child."""
    return sys.executable, "-m", "pdserve.worker.remote_main", str(fd), str(os.getpid())


def worker_environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
