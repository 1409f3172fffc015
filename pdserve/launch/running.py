"""A supervisor from its start to its end: the first signal drains, the second ends by force."""

import asyncio
import signal
from collections.abc import Callable

import structlog

from pdserve.cluster.supervisor import Supervisor
from pdserve.config.times import Times

EXIT_FORCED = 130
_log = structlog.get_logger(__name__)


async def run_until_signal(supervisor: Supervisor, times: Times, on_drain: Callable[[], object] | None = None) -> int:
    """Supervise until SIGINT, SIGTERM or SIGHUP; the exit code. on_drain is called before the draining begins. Raises
    what the supervisor raises."""
    stop, force = signals()
    run = asyncio.create_task(supervisor.run())
    try:
        await first(stop, run)
        if not run.done():
            if on_drain:
                on_drain()
            _log.info("draining: running requests finish; Ctrl-C again ends them", timeout=times.drain_timeout)
            drain = asyncio.create_task(supervisor.drain())
            await first(force, drain, run)
            drain.cancel()
        forced = force.is_set()
        if forced:
            run.cancel()
        await asyncio.wait([run])
        if not forced:
            run.result()
        return EXIT_FORCED if forced else 0
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


def signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first and of the second request to end."""
    stop, force = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, force


async def first(event: asyncio.Event, *tasks: "asyncio.Task[None]") -> None:
    """Return when one of the tasks has ended or the event is set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
