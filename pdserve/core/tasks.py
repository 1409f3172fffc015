"""Background work that ends with the block it belongs to, and calls that end together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

_CANCEL_AGAIN = 0.2

_T = TypeVar("_T")


@asynccontextmanager
async def running(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Each as a task, ended on the way out. One that fails before is logged at once, and its error is raised when the
    block ends without one of its own."""
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(_tell_failure)
    try:
        yield
    finally:
        await end(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            raise error


def _tell_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.critical("background work has failed and is done no more: %s", task.get_coro(), exc_info=error)


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel until they have ended: libraries may lose a cancellation that meets the end of a call. What they raised is
    not raised here."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN)
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_ended(calls: Iterable[Awaitable[_T]]) -> list[_T]:
    """Every result, or the first error, but only once every call has ended."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    done: list[_T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
