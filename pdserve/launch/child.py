"""The child's side of cluster.process_launcher: payload in, one answer out, a signal to drain."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import structlog
import uvloop

from pdserve.core.errors import PdserveError
from pdserve.core.parent_death import die_with_parent

EXIT_FAILED = 1
EXIT_REFUSED = 78
"""EX_CONFIG: the answer said why."""

_log = structlog.get_logger(__name__)


class Parent:
    """The line back to the supervisor. Exactly one answer is given: ready or refused."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd: int | None = fd

    @property
    def answered(self) -> bool:
        return self._fd is None

    def ready(self, **facts: str | int) -> None:
        """Announce that this process serves."""
        self._answer({"ready": facts})

    def refuse(self, error: PdserveError) -> None:
        """Say why this process cannot serve."""
        self._answer({"error": {"code": error.code, "message": str(error)}})

    def _answer(self, message: Mapping[str, Any]) -> None:
        if self._fd is None:
            raise RuntimeError("the parent has its answer already")
        fd, self._fd = self._fd, None
        with os.fdopen(fd, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(message) + "\n")


Main = Callable[[Mapping[str, Any], Parent, asyncio.Event], Awaitable[None]]
"""payload, parent, and an event that is set when the process is to drain and return."""


def run_child(main: Main) -> NoReturn:
    """Run a child's main until it returns, then exit the process.

    A PdserveError before the answer becomes the answer, and a line of the log after it; any other error ends the
    process with a traceback on stderr.
    """
    payload: dict[str, Any] = json.load(sys.stdin)
    die_with_parent(int(payload["parent_pid"]))
    parent = Parent(int(payload["ready_fd"]))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_done(main, payload, parent))
    except PdserveError as error:
        if parent.answered:
            _log.error("this process ends", cause=str(error), code=error.code)
            sys.exit(EXIT_FAILED)
        parent.refuse(error)
        sys.exit(EXIT_REFUSED)
    sys.exit(0)


async def _until_done(main: Main, payload: Mapping[str, Any], parent: Parent) -> None:
    drain = asyncio.Event()

    def on_signal() -> None:
        if not parent.answered:
            os._exit(EXIT_FAILED)  # nothing served yet, nothing to finish; loading cannot be interrupted otherwise
        drain.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    await main(payload, parent, drain)
