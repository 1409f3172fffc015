"""What every process that speaks with clients is made of: limits, keys, the model's facts, and its ports."""

import asyncio
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.config.clients import TenantConfig
from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError
from pdserve.core.protocols import ModelInfo
from pdserve.gateway.auth import TenantKeys
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.grpc.server import GrpcServer
from pdserve.gateway.http.app import create_app
from pdserve.gateway.intake import Intake
from pdserve.gateway.sampling_defaults import load_sampling_defaults
from pdserve.gateway.serve import bind, serve_http
from pdserve.gateway.settings import GatewaySettings
from pdserve.launch.ports import local_address
from pdserve.launch.sizing import max_model_len
from pdserve.model.checkpoint import eos_token_ids, model_revision
from pdserve.model.config import load_config

if TYPE_CHECKING:
    from socket import socket

    from pdserve.telemetry.tracing import TraceQueue

STOP_GRACE = 2.0
"""Seconds for the last bytes of answers that are complete, after all requests have ended."""
_LINGER = 1.5
"""Ages of a connection (10 % more or less) after which every client has opened another one, slow ones too."""
_COLLECT_EVERY = 10_000
"""Objects more than before, for a look at the youngest: requests leave few cycles behind."""


@dataclass(frozen=True, slots=True)
class ClientPorts:
    """HTTP and gRPC for clients, listening."""

    gateway: Gateway
    listener: "socket"
    grpc_server: GrpcServer

    @classmethod
    def open(cls, gateway: Gateway, config: Config, *, shared: bool = False) -> "ClientPorts":
        """shared: with other processes of the same gateway. Raises ConfigError for a port that cannot be had."""
        listener = bind(config.host, config.port, shared=shared)
        return cls(gateway, listener, GrpcServer(gateway, config.host, config.grpc_port, shared=shared))

    @property
    def address(self) -> str:
        """host:port of HTTP for a client on this machine."""
        host, port = self.listener.getsockname()[:2]
        return local_address(host, port)

    async def serve(self, leaving: asyncio.Event, stop: asyncio.Event) -> None:
        """Until stop is set, and then for as long as the last bytes take. Once leaving is set, connections end behind
        what runs."""
        async with asyncio.TaskGroup() as group:
            app, patience = create_app(self.gateway), self.gateway.settings.patience
            group.create_task(serve_http(app, self.listener, stop, STOP_GRACE, leaving, patience))
            group.create_task(self.grpc_server.serve(stop, STOP_GRACE, leaving))


async def leave(intake: Intake, config: Config, leaving: asyncio.Event) -> None:
    """Have clients go to other routers if there are any, then end their connections behind what runs."""
    loop = asyncio.get_running_loop()
    until = loop.time() + max(0.0, config.times.drain_timeout - 2 * STOP_GRACE)
    if config.redis.url or config.discovery.engines:
        timeout = min(_LINGER * config.times.connection_age, (until - loop.time()) / 2)
        await intake.left(timeout, config.times.connection_idle)
    leaving.set()
    await intake.drained(until - loop.time())


def settings(config: Config) -> GatewaySettings:
    return GatewaySettings(
        api_keys=tuple(key.get_secret_value() for key in config.api_keys),
        tenants=tuple(map(tenant_keys, config.tenants)),
        max_body_bytes=config.limits.max_body_bytes,
        max_chat_tokens=config.limits.max_chat_tokens,
        request_timeout=config.limits.request_timeout,
        sampling_defaults=load_sampling_defaults(config.model_path),
        admin_port=config.admin_port,
        pair_check_timeout=config.times.pair_check,
        requests_kept=config.telemetry.requests_kept,
        answers_kept_for=config.idempotency.keep,
        answers_kept=config.idempotency.max_answers,
        connection_age=config.times.connection_age,
    )


def tenant_keys(tenant: TenantConfig) -> TenantKeys:
    """What the gateway must know to tell who asks."""
    return TenantKeys(
        name=tenant.name,
        digests=tuple(bytes.fromhex(key.removeprefix("sha256:")) for key in tenant.keys),
        share_group=tenant.share_group,
        most_urgent=tenant.priority,
    )


def model_info(config: Config) -> ModelInfo:
    """What the gateway must know of the model, read without torch."""
    path = config.model_path
    model = load_config(path)
    return ModelInfo(
        name=config.model_name,
        revision=model_revision(path),
        vocab_size=model.vocab_size,
        max_model_len=max_model_len(config, model),
        eos_token_ids=eos_token_ids(path, model),
    )


def open_traces(endpoint: str | None, gateway: Gateway) -> "TraceQueue | None":
    """A queue of every request's trace, if there is where to send them; its `run` does. Raises ConfigError without the
    extra."""
    if endpoint is None:
        return None
    try:
        from pdserve.telemetry.tracing import TraceQueue, otlp_exporter
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"telemetry.otlp_endpoint needs {error.name}: pip install 'pdserve[otel]', or leave the setting out"
        ) from error
    traces = TraceQueue(otlp_exporter(endpoint), gateway.metrics, gateway.clock)
    gateway.tell_ends(traces.offer)
    return traces


def spare_garbage_collection() -> None:
    """Once all is set up: what is there now stays for good and need not be looked at again. With Python's own settings
    collecting takes a fifth of the time that goes to HTTP."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY)
