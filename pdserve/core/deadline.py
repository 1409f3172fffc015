"""A deadline of many waits in a row, with one timer for all of them."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """What asyncio.timeout_at is for one wait, for whoever waits again and again, as a stream does for each token.

    One task waits at a time. Times are the event loop's. `close` frees the timer. struck says of the latest wait
    whether it ended because of this deadline: work may raise a TimeoutError of its own.
    """

    def __init__(self, when: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._when = when
        self._task: asyncio.Task[object] | None = None
        self.struck = False
        self._struck = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._arm()

    def move(self, when: float) -> None:
        """To be called as often as one likes: a later time costs nothing until the timer fires."""
        self._when = when
        if self._timer is None or when < self._timer_at:
            self._arm()

    async def before(self, work: Awaitable[T]) -> T:
        """The result of work. Raises TimeoutError, with work cancelled, when the deadline passes first, or has passed
        and work must wait."""
        task = asyncio.current_task(self._loop)
        assert task is not None
        cancelling = task.cancelling()
        self._task = task
        self.struck = False
        if self._timer is None:
            self._arm()
        try:
            return await work
        except asyncio.CancelledError:
            if self._struck:
                self._struck = False
                if task.uncancel() <= cancelling:
                    self.struck = True
                    raise TimeoutError from None
            raise
        finally:
            self._task = None
            if self._struck:
                self._struck = False
                task.uncancel()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.close()
        self._timer, self._timer_at = self._loop.call_at(self._when, self._fire), self._when

    def _fire(self) -> None:
        self._timer = None
        if self._loop.time() < self._when:
            self._arm()
        elif self._task is not None and not self._struck:
            self._struck = True
            self._task.cancel()
