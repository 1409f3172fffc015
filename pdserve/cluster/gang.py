"""Processes launched together that share their fate: a leader, and followers that come to its door.

The door is a socket that listens before the leader runs: a follower may connect as soon as it is started,
and waits in the backlog until the leader accepts. What they say to each other is their own business, but
each must notice when the other's end of the connection closes: that is how the rest of a gang ends by itself.
"""

import asyncio
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog

from pdserve.cluster.launcher import Launched, LaunchSpec
from pdserve.core.errors import DeadlineExceeded, EngineDied, PdserveError, TransferError, Unavailable
from pdserve.core.exit_code import manner_of_end

GRACE = 2.0
"""Seconds after the first end for a leader to end with a reason of its own, and then for its followers."""
_TELLING = 3 * GRACE
"""Seconds for a gang to end once its leader has failed, before its error is told without knowing the others'."""
_MISSING = Unavailable, TransferError, DeadlineExceeded
"""What one says whose peer is gone."""

_log = structlog.get_logger(__name__)


def open_door(host: str) -> socket.socket:
    """Listens on a free port of that address. Raises OSError when this machine does not have it."""
    return socket.create_server((host, 0))


def followers_of(spec: LaunchSpec, door: str) -> list[LaunchSpec]:
    """What follows it, told the address of its door."""
    return [replace(follower, payload={**follower.payload, "leader": door}) for follower in spec.followers]


def address_of(door: socket.socket) -> str:
    """host:port."""
    host, port = door.getsockname()[:2]
    return f"{host}:{port}"


class LaunchedGang:
    """launcher.Launched for a leader and its followers, already launched: members, in the order of the spec.

    When one ends all do: a leader that has lost a follower has a moment to end by itself, and so have the
    followers of a leader that has ended; then the rest is killed.
    """

    def __init__(self, spec: LaunchSpec, members: Sequence[Launched]) -> None:
        named = zip((spec, *spec.followers), members, strict=True)
        self._members = [_Member(each.name, launched) for each, launched in named]
        self._leader = self._members[0]
        self._draining = False
        self._killed = False
        self._leader_killed = False
        self._first = self._leader
        self._end = asyncio.create_task(self._until_ended())

    @property
    def pid(self) -> int:
        return self._leader.launched.pid

    async def ready(self) -> dict[str, Any]:
        """The leader's answer; else the error of whoever caused the end, which names it."""
        await asyncio.wait([self._leader.answer, self._end], return_when=asyncio.FIRST_COMPLETED)
        facts = self._leader.answer.result() if self._leader.answer.done() else None
        if isinstance(facts, dict):
            return facts
        await asyncio.wait([self._end], timeout=_TELLING)  # the first to fail need not be the first to say so
        raise self._cause()

    async def ended(self) -> int:
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        self._draining = True
        self._leader.launched.terminate()

    def kill(self) -> None:
        self._killed = True
        self._leader_killed |= not self._leader.end.done()
        self._kill()

    def _kill(self) -> None:
        for member in self._members:
            member.launched.kill()

    async def _until_ended(self) -> int:
        ends = [member.end for member in self._members]
        leader = self._leader.end
        lost = await self._loss()
        if not leader.done():
            await asyncio.wait([leader], timeout=GRACE)
        if leader.done():
            await asyncio.wait(ends, timeout=GRACE)
        if not self._killed:
            self._blame(lost)
        self._kill()
        await asyncio.wait([*ends, *(member.answer for member in self._members)])
        return self._code(leader.result())

    def _code(self, told: int) -> int:
        """The leader's. On another machine than a follower's it may see that one's end before it is killed itself, and
        fails of it: then it counts as killed all the same."""
        return -signal.SIGKILL if self._leader_killed and told > 0 else told

    async def _loss(self) -> "_Member":
        """Who ended first, without the followers that were let go: a leader that drains may have more to do."""
        left = {member.end: member for member in self._members}
        while True:
            done, _ = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for member in map(left.pop, done):
                if not self._let_go(member):
                    return member

    def _blame(self, first: "_Member") -> None:
        """One that was killed, while we have killed none, need not be the first whose end is heard of."""
        killed = [member for member in self._members if member.end.done() and member.end.result() < 0]
        self._first = killed[0] if killed else first
        if self._first is not self._leader:
            how = manner_of_end(self._first.end.result())
            _log.warning("a follower is lost, its gang ends", process=self._first.name, gang=self._leader.name, how=how)

    def _let_go(self, member: "_Member") -> bool:
        return self._draining and member is not self._leader and member.end.result() == 0

    def _cause(self) -> PdserveError:
        """Somebody's own reason tells more than that others miss them; without one, the first end is the cause."""
        errors = [member.error for member in (self._first, *self._members) if member.error]
        for error in errors:
            if not isinstance(error, _MISSING):
                return error
        return self._first.error or EngineDied(
            f"{self._first.name} {manner_of_end(self._first.end.result())} before {self._leader.name} was ready"
        )


class _Member:
    """One process of a gang, and what becomes of it."""

    def __init__(self, name: str, launched: Launched) -> None:
        self.name = name
        self.launched = launched
        self.answer = asyncio.create_task(self._ask())
        self.end = asyncio.ensure_future(launched.ended())

    @property
    def error(self) -> PdserveError | None:
        """What it answered instead of ready, so far."""
        answer = self.answer.result() if self.answer.done() else None
        return answer if isinstance(answer, PdserveError) else None

    async def _ask(self) -> dict[str, Any] | PdserveError:
        try:
            return await self.launched.ready()
        except PdserveError as error:
            return error
