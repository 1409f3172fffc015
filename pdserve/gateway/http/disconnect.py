"""Work that ends when the client goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from pdserve.core.errors import Cancelled

T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work; raises Cancelled, with work cancelled and ended, once the client is gone.

    The body must have been read: receive then only reports the disconnect. Work runs in the caller's task, which costs
    less than one of its own."""
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    gone, working = False, True

    def leave(watcher: asyncio.Task[None]) -> None:
        nonlocal gone
        if working and not watcher.cancelled():
            gone = task.cancel()

    watcher = asyncio.create_task(_disconnected(receive))
    watcher.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() <= cancelling:
            raise Cancelled("the client disconnected") from None
        raise
    finally:
        working = False
        watcher.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
