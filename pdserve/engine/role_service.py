"""RoleService: the supervisor has a running engine take another role."""

from collections.abc import Awaitable, Mapping

import grpc

from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.errors import PdserveError, StaleEpoch, Unsupported
from pdserve.engine.engine import Engine
from pdserve.rpc.generated.pdserve.v1 import scaler_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.scaler_pb2_grpc import RoleServiceServicer

_Context = grpc.aio.ServicerContext[pb.SetRoleRequest, Awaitable[pb.SetRoleResponse]]


class RoleService(RoleServiceServicer):
    """roles: those the engine may take, each with its limits."""

    def __init__(self, engine: Engine, roles: Mapping[Role, EngineLimits]) -> None:
        self._engine = engine
        self._roles = roles

    async def SetRole(self, request: pb.SetRoleRequest, context: _Context) -> pb.SetRoleResponse:
        endpoint = self._engine.endpoint
        if request.epoch != endpoint.epoch:
            return _refusal(StaleEpoch(f"another incarnation of {endpoint.engine_id} was meant"))
        role = next((role for role in self._roles if role.value == request.role), None)
        if role is None:
            return _refusal(Unsupported(f"{endpoint.engine_id} cannot take the role {request.role[:50]!r}", "role"))
        self._engine.become(role, self._roles[role])
        return pb.SetRoleResponse()


def _refusal(error: PdserveError) -> pb.SetRoleResponse:
    return pb.SetRoleResponse(error_code=error.code, error_message=str(error))
