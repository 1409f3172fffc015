"""Reads whose bytes pass through our own hands: they arrive in a buffer and are copied into place."""

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pdserve.transfer.base import ReadPlan, TransferState
from pdserve.transfer.spans import SpanCursor


class _Bytes(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> "_Bytes": ...


_B = TypeVar("_B", bound=_Bytes)


class StagedRead(Generic[_B]):
    """A transfer fed by another thread with the plan's bytes in order.

    store(offset, piece) copies a piece into our memory. cancel() and fail() are fences: once they return,
    nothing is stored any more, whatever still arrives.
    """

    def __init__(self, plan: ReadPlan, store: Callable[[int, _B], None]) -> None:
        self._cursor = SpanCursor(plan.local, plan.lengths)
        self._store = store
        self._lock = threading.Lock()
        self._state = TransferState.IN_PROGRESS
        self._on_cancel: Callable[[], object] | None = None
        self.error = ""

    @property
    def over(self) -> bool:
        return self._state is not TransferState.IN_PROGRESS

    def take(self, data: _B) -> bool:
        """Copy the next bytes into place; whether more are wanted."""
        with self._lock:
            if self.over:
                return False
            if len(data) > self._cursor.remaining:
                self._end("the peer sent more than it was asked for")
                return False
            begin = 0
            for offset, length in self._cursor.take(len(data)):
                self._store(offset, data[begin : begin + length])  # type: ignore[arg-type]
                begin += length
            return self._cursor.remaining > 0

    def finish(self) -> None:
        """No more bytes come, and those that came are where they belong."""
        with self._lock:
            if not self.over:
                missing = self._cursor.remaining
                self._end(f"the peer stopped {missing} bytes early" if missing else "")

    def fail(self, reason: str) -> None:
        with self._lock:
            if not self.over:
                self._end(reason)

    def on_cancel(self, tell: Callable[[], object]) -> None:
        """Call tell once the bytes are not wanted any more, at once if that is so already."""
        with self._lock:
            self._on_cancel = tell
            late = self.over
        if late:
            tell()

    def cancel(self) -> None:
        self.fail("cancelled")
        with self._lock:
            tell = self._on_cancel
        if tell is not None:
            tell()

    def poll(self) -> TransferState:
        return self._state

    def _end(self, reason: str) -> None:
        # The reason first: poll looks at the state without the lock.
        self.error = reason
        self._state = TransferState.ERROR if reason else TransferState.DONE
