"""Who executes a keyed request, and what came of it: the seam, and the claims of one process alone.

A name stands for a client's idempotency key, a fingerprint for the body it came with, an owner for one execution. Both
implementations pass tests/contract/test_claims.py.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.clock import Clock
from pdserve.core.errors import KeyReused
from pdserve.shared.waiters import Waiters

REUSED = "this idempotency key came with another body before; use a new key for a new request"


@dataclass(frozen=True, slots=True)
class Mine:
    """Whoever asked executes the request now."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Another execution is under way. left: seconds for which that is certain."""

    left: float


@dataclass(frozen=True, slots=True)
class Kept:
    """The request was executed."""

    result: bytes


class Claims(Protocol):
    """At most one execution per name at a time, and none after one that was finished, until that is forgotten."""

    on_taken: Callable[[str, str], None]
    """Told (name, owner) when the claim of a running execution has passed to another one."""

    async def claim(self, name: str, owner: str, fingerprint: bytes) -> Mine | Busy | Kept:
        """Raises KeyReused for another fingerprint than before, Unavailable while nobody can tell who executes."""
        ...

    async def finish(self, name: str, owner: str, result: bytes) -> None:
        """Keep the result of an execution; does nothing for one whose claim has passed to another."""
        ...

    async def release(self, name: str, owner: str) -> None:
        """The execution came to nothing: another may try."""
        ...

    async def changed(self, name: str, timeout: float) -> None:
        """Returns when no execution of the name is under way, or after so many seconds."""
        ...


@dataclass(slots=True)
class _Entry:
    owner: str
    fingerprint: bytes
    result: bytes | None = None
    until: float = 0.0


class LocalClaims:
    """Those of one process. It remembers results for keep seconds and at most max_answers, the latest."""

    def __init__(self, clock: Clock, *, keep: float, max_answers: int) -> None:
        self._clock = clock
        self._keep = keep
        self._max_answers = max_answers
        self._running: dict[str, _Entry] = {}
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._waiters = Waiters()
        self.on_taken: Callable[[str, str], None] = lambda name, owner: None

    async def claim(self, name: str, owner: str, fingerprint: bytes) -> Mine | Busy | Kept:
        self._forget()
        entry = self._running.get(name) or self._kept.get(name)
        if entry is None:
            self._running[name] = _Entry(owner, fingerprint)
            return Mine()
        check_same(entry.fingerprint, fingerprint)
        return Busy(self._keep) if entry.result is None else Kept(entry.result)

    async def finish(self, name: str, owner: str, result: bytes) -> None:
        entry = self._running.get(name)
        if entry is None or entry.owner != owner:
            return
        del self._running[name]
        entry.result, entry.until = result, self._clock.monotonic() + self._keep
        self._kept[name] = entry
        self._forget()
        self._waiters.wake(name)

    async def release(self, name: str, owner: str) -> None:
        if (entry := self._running.get(name)) and entry.owner == owner:
            del self._running[name]
            self._waiters.wake(name)

    async def changed(self, name: str, timeout: float) -> None:
        await self._waiters.wait(name, timeout, lambda: self._under_way(name))

    async def _under_way(self, name: str) -> bool:
        return name in self._running

    def _forget(self) -> None:
        now = self._clock.monotonic()
        while self._kept and (len(self._kept) > self._max_answers or next(iter(self._kept.values())).until <= now):
            self._kept.popitem(last=False)


def check_same(known: bytes, fingerprint: bytes) -> None:
    """Raises KeyReused."""
    if known != fingerprint:
        raise KeyReused(REUSED, "idempotency-key")
