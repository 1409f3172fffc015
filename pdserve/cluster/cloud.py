"""The supervisor's processes as the scaler's cloud: engines join, drain and end, and take other roles."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

import grpc

from pdserve.cluster.member import Member, Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.supervisor import Desired, Supervisor
from pdserve.core.endpoint import Role
from pdserve.core.errors import Unavailable, Unsupported, from_wire
from pdserve.rpc.channel import open_channel
from pdserve.rpc.generated.pdserve.v1 import scaler_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.scaler_pb2_grpc import RoleServiceStub
from pdserve.scaler.decision import Replicas

_ANSWER_TIMEOUT = 2.0
"""Seconds an engine has to take another role: it need only note it."""
_WARMING = (Phase.DOWN, Phase.STARTING, Phase.KILLED)

Recruit = Callable[[str, Role], Desired]
"""How an engine of that id and role is started."""


class SupervisedCloud:
    """scaler.runner.Cloud of one supervisor."""

    def __init__(self, supervisor: Supervisor, recruit: Recruit, *, prefix: str = "", flippable: str = "") -> None:
        """prefix: before the names of new engines. flippable: why engines cannot take another role; empty when they
        can."""
        self._supervisor = supervisor
        self._recruit = recruit
        self._prefix = prefix
        self._flippable = flippable
        self._dismissed: list[str] = []
        """Engines the scaler has let go, which it may start again. An operator's are his."""

    def pools(self) -> Mapping[Role, Replicas]:
        ready: Counter[Role | None] = Counter()
        warming: Counter[Role | None] = Counter()
        for member in self._supervisor.members.values():
            if _is_wanted(member):
                warms = member.phase in _WARMING or member.returns
                (warming if warms else ready)[member.role] += 1
        return {
            role: Replicas(wanted=ready[role] + warming[role], ready=ready[role], warming=warming[role])
            for role in Role
        }

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        more = engines - self.pools()[role].wanted
        for _ in range(more):
            self._add(role)
        leaving = self._leaving(role, victims)[: max(0, -more)]
        for engine_id in leaving:
            self._supervisor.drain_engine(engine_id, returns=False)
            self._dismissed.append(engine_id)
        await self._until(lambda _: self.pools()[role].wanted == engines)

    async def flip(self, engine_id: str, role: Role) -> None:
        if self._flippable:
            raise Unsupported(self._flippable, "flip")
        member = self._supervisor.members.get(engine_id)
        if member is None or member.phase is not Phase.READY:
            raise Unavailable(f"{engine_id} is not there to take another role")
        await _set_role(member, role)
        self._supervisor.flipped(self._recruit(engine_id, role))
        await self._until(lambda members: members[engine_id].role is role)

    async def _until(self, holds: Callable[[Members], bool]) -> None:
        """What was asked for is part of the supervisor's plan, unless somebody else has asked for something else."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await self._supervisor.until(holds)

    def _add(self, role: Role) -> None:
        engine_id = self._returning(role)
        if engine_id is None:
            self._supervisor.join(self._recruit(self._new_id(role), role))
            return
        self._dismissed.remove(engine_id)
        if self._supervisor.members[engine_id].role is not role:
            self._supervisor.flipped(self._recruit(engine_id, role))
        self._supervisor.return_engine(engine_id)

    def _returning(self, role: Role) -> str | None:
        """A dismissed engine, of that role before one that is to take it: if each role had its own, flips between two
        scalings would leave ever more of them behind."""
        members = self._supervisor.members
        gone = [each for each in self._dismissed if members[each].phase is Phase.STOPPED]
        same = [each for each in gone if members[each].role is role]
        return next(iter(same if self._flippable else same + gone), None)

    def _new_id(self, role: Role) -> str:
        number = 0
        while self._supervisor.knows(f"{self._prefix}{role}-{number}"):
            number += 1
        return f"{self._prefix}{role}-{number}"

    def _leaving(self, role: Role, victims: tuple[str, ...]) -> list[str]:
        """Those that do not serve yet, then the victims, then the newest."""
        wanted = [each for each in self._supervisor.members.values() if each.role is role and _is_wanted(each)]
        order = {engine_id: place for place, engine_id in enumerate(victims)}
        places = {each.id: place for place, each in enumerate(wanted)}
        wanted.sort(key=lambda each: (each.phase not in _WARMING, order.get(each.id, len(order)), -places[each.id]))
        return [each.id for each in wanted]


def _is_wanted(member: Member) -> bool:
    leaves = member.phase is Phase.DRAINING and not member.returns
    return member.role is not None and not leaves and member.phase is not Phase.STOPPED


async def _set_role(member: Member, role: Role) -> None:
    """Raises what the engine refuses with, Unavailable when it does not answer."""
    async with open_channel(member.address) as channel:
        request = pb.SetRoleRequest(epoch=member.epoch, role=role.value)
        try:
            answer = await RoleServiceStub(channel).SetRole(request, timeout=_ANSWER_TIMEOUT)
        except grpc.aio.AioRpcError:
            raise Unavailable(f"{member.id} does not answer") from None
    if answer.error_code:
        raise from_wire(answer.error_code, answer.error_message)
