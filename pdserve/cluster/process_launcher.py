"""Launcher of plain processes on this machine.

A child gets its payload as JSON on stdin and answers with one JSON line on a pipe of its own, never on
stdout: libraries log there. stdout and stderr go to the supervisor's stderr, line by line under the
child's name. A child leads its own session, so that Ctrl-C in a terminal reaches only the supervisor
and a kill reaches the child's workers too.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from pdserve.cluster.gang import LaunchedGang, address_of, followers_of, open_door
from pdserve.cluster.launcher import Launched, LaunchSpec
from pdserve.core.errors import EngineDied, from_wire
from pdserve.core.exit_code import manner_of_end

MAX_ANSWER_BYTES = 64 * 1024
_HOST = "127.0.0.1"
_KEPT_LINES = 15
_LINE_BYTES = 8192


class ProcessLauncher:
    """The `process` launcher; holds nothing itself, and has no use for a spec's resources.

    name_lines puts the child's name before each line of its log; logs for machines go without. write
    takes those lines, in a thread of each child's own. command is what runs a spec's module: a wrapper of it
    must exec it, so that the child keeps its process id.
    """

    def __init__(
        self,
        *,
        name_lines: bool = True,
        write: Callable[[str], object] | None = None,
        command: Callable[[LaunchSpec], tuple[str, ...]] | None = None,
    ) -> None:
        self._name_lines = name_lines
        self._write = write or write_line
        self._command = command or module_command

    async def launch(self, spec: LaunchSpec) -> Launched:
        if not spec.followers:
            return await self.start(spec)
        with open_door(str(spec.payload.get("host", _HOST))) as door:
            members = [await self.start(spec, door)]
            address = address_of(door)
        try:
            for follower in followers_of(spec, address):
                members.append(await self.start(follower))
        except BaseException:
            for member in members:
                member.kill()
            raise
        return LaunchedGang(spec, members)

    async def start(self, spec: LaunchSpec, door: socket.socket | None = None) -> "LaunchedProcess":
        """The process alone, without its followers; a door for them is inherited, and ours stays open."""
        answer_read, answer_write = os.pipe()
        log_read, log_write = os.pipe()
        inherited = {"door": door.fileno()} if door else {}
        prefix = line_prefix(spec.name) if self._name_lines else ""
        log = _Log(prefix, os.fdopen(log_read, "rb"), self._write)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(spec),
                stdin=asyncio.subprocess.PIPE,
                stdout=log_write,
                stderr=log_write,
                pass_fds=(answer_write, *inherited.values()),
                start_new_session=True,
                env=_environment(spec.threads),
            )
        except BaseException:
            os.close(answer_read)
            raise
        finally:
            os.close(answer_write)
            os.close(log_write)
        launched = LaunchedProcess(spec.name, process, answer_read, log)
        try:
            await launched.tell({**spec.payload, **inherited, "ready_fd": answer_write, "parent_pid": os.getpid()})
        except BaseException:
            launched.kill()
            raise
        return launched


class LaunchedProcess:
    """launcher.Launched for one child process; what it holds ends with the process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, answer_fd: int, log: "_Log") -> None:
        self._name = name
        self._process = process
        self._log = log
        self._answer = asyncio.get_running_loop().create_task(_read_answer(answer_fd))

    @property
    def pid(self) -> int:
        return self._process.pid

    async def tell(self, payload: dict[str, Any]) -> None:
        """Hand over the payload; a child that ended before reading it is noticed by ready()."""
        stdin = self._process.stdin
        if stdin is None:
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(json.dumps(payload).encode())
            await stdin.drain()
            stdin.close()
            await stdin.wait_closed()

    async def ready(self) -> dict[str, Any]:
        line = await asyncio.shield(self._answer)
        if not line.endswith(b"\n"):
            raise await self._death()
        with suppress(ValueError):
            match json.loads(line):
                case {"ready": dict() as facts}:
                    return facts
                case {"error": {"code": str() as code, "message": str() as message}}:
                    raise from_wire(code, message)
        raise EngineDied(f"{self._name} answered something else than ready or an error")

    async def ended(self) -> int:
        code = await self._process.wait()
        await asyncio.shield(self._answer)
        await asyncio.to_thread(self._log.finish)
        return code

    def terminate(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _death(self) -> EngineDied:
        code = await self._process.wait()
        tail = await asyncio.to_thread(self._log.finish)
        said = "; its last words:\n" + "\n".join(f"    {line}" for line in tail) if tail else ""
        return EngineDied(f"{self._name} {manner_of_end(code)} before it was ready{said}")


class _Log:
    """Copies a child's output from a thread of its own, so that a slow terminal cannot hold up the
    supervisor's event loop, and keeps the last lines for the report of a death."""

    def __init__(self, prefix: str, pipe: IO[bytes], write: Callable[[str], object]) -> None:
        self._prefix = prefix
        self._pipe = pipe
        self._write = write
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._copy, name="child log", daemon=True)
        self._thread.start()

    def finish(self) -> list[str]:
        """Wait a moment for what is still in the pipe of a process that has ended; the last lines."""
        self._thread.join(timeout=1.0)
        return list(self._lines)

    def _copy(self) -> None:
        with self._pipe:
            while raw := self._pipe.readline(_LINE_BYTES):
                line = raw.decode(errors="replace").rstrip("\n")
                self._lines.append(line)
                self._write(self._prefix + line)


def module_command(spec: LaunchSpec) -> tuple[str, ...]:
    """The spec's module, run by this interpreter."""
    return sys.executable, "-m", spec.module


def line_prefix(name: str) -> str:
    """What a child's lines begin with in a log for people."""
    return f"[{name}] "


def write_line(line: str) -> None:
    """To stderr. When nobody reads it any more, the line is lost and its child goes on."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


async def _read_answer(fd: int) -> bytes:
    """The one line a child writes; shorter, without its newline, when the child ended instead."""
    reader = asyncio.StreamReader(limit=MAX_ANSWER_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        return await reader.readline()
    except ValueError:
        return b""
    finally:
        transport.close()


def _environment(threads: int) -> dict[str, str]:
    """Ours, plus a bound on the compute threads of numeric libraries: they assume the machine is theirs."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
