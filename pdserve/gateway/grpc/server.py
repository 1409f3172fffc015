"""Listening for gRPC: the Inference service, health and reflection."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.core.errors import ConfigError
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.grpc.service import InferenceService
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import add_InferenceServicer_to_server

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_REFRESH = 1.0
"""Seconds until a watcher of the health service learns of a change."""
_UNTIL_STOP = 86400.0
"""Seconds for running calls of a server that is leaving: whoever stops it says how long they have."""


class GrpcServer:
    """A bound server; `port` is the one it got. Create it on the event loop it serves on.

    shared: other processes listen there, too. Raises ConfigError when the address cannot be had."""

    def __init__(self, gateway: Gateway, host: str, port: int, *, shared: bool = False) -> None:
        options = [
            ("grpc.max_receive_message_length", gateway.settings.max_body_bytes),
            ("grpc.so_reuseport", int(shared)),
            # The client opens another connection and only then ends this one, behind its calls.
            ("grpc.max_connection_age_ms", int(1000 * gateway.settings.connection_age)),
        ]
        self._server = grpc.aio.server(options=options)
        self._health = _Health(gateway)
        add_InferenceServicer_to_server(InferenceService(gateway), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen for gRPC on {address}; is the port in use?") from error

    async def serve(self, stop: asyncio.Event, grace: float, leaving: asyncio.Event | None = None) -> None:
        """Serve until stop is set, then give running calls grace seconds. Once leaving is set no calls are taken any
        more: clients are told that their connections end with the calls that run."""
        await self._server.start()
        refreshing = asyncio.create_task(self._health.refresh_forever())
        parting = asyncio.create_task(self._part(leaving or stop))
        try:
            await stop.wait()
        finally:
            refreshing.cancel()
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace)
            parting.cancel()
            await asyncio.gather(refreshing, parting, return_exceptions=True)

    async def _part(self, leaving: asyncio.Event) -> None:
        await leaving.wait()
        await self._server.stop(_UNTIL_STOP)


class _Health(health.aio.HealthServicer):
    """SERVING while the gateway is ready. Check looks afresh; Watch sees what refresh_forever finds."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self._gateway = gateway

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:100]!r}")
        return health_pb2.HealthCheckResponse(status=self._status())

    async def refresh_forever(self) -> None:
        while True:
            for service in ("", SERVICE):
                await self.set(service, self._status())
            await asyncio.sleep(_HEALTH_REFRESH)

    def _status(self) -> Any:  # an enum value; the stubs give the enum no type
        statuses = health_pb2.HealthCheckResponse
        return statuses.SERVING if self._gateway.ready else statuses.NOT_SERVING
