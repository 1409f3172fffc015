"""`pdserve scale`: a scaler of its own, for engines in pods. Of several, the one that holds the Lease acts.

It answers GET /live while it runs, GET /ready while it leads, so that a Service leads gateways to it, and GET /metrics.
"""

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pdserve.cluster.k8s.announcer import Announcer
from pdserve.cluster.k8s.cloud import PodCloud, refuse_flips
from pdserve.cluster.k8s.election import Election
from pdserve.cluster.k8s.target import Target, targets_of
from pdserve.cluster.scaling import Scaling
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.core.tasks import running
from pdserve.gateway.serve import bind, serve_http
from pdserve.launch.kubernetes import open_kubernetes
from pdserve.launch.running import EXIT_FORCED, first, signals
from pdserve.rpc.channel import new_server
from pdserve.scaler.load import load_policy
from pdserve.telemetry.logs import configure_logs
from pdserve.telemetry.metrics import CONTENT_TYPE
from pdserve.telemetry.scaler_metrics import LEADER, ScalerCollector

if TYPE_CHECKING:
    from pdserve.cluster.k8s.client import KubeClient

_STOP_GRACE = 1.0
"""Seconds for a probe's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerPlace:
    """host is where gateways reach it, at scaler.port, and where probes are answered, at probe_port."""

    host: str
    probe_port: int


def scale(config: Config, place: ScalerPlace) -> int:
    """Scale until SIGINT, SIGTERM or SIGHUP; the exit code. Raises ConfigError for input that cannot work."""
    targets = check(config)
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_scale(config, place, targets))


def check(config: Config) -> dict[Role, Target]:
    """What holds the pods of each pool. Raises ConfigError for a configuration or a policy this cannot scale by."""
    if config.policies is None:
        raise ConfigError("policies: names no file; a scaler needs a policy (docs/autoscaling.md)")
    policy = load_policy(Path(config.policies))
    if reason := refuse_flips(policy):
        raise ConfigError(f"{config.policies}: {reason}")
    targets = targets_of(config.scaler.kubernetes)
    for role in policy.pools.by_role():
        if role not in targets:
            raise ConfigError(
                f"scaler.kubernetes.{role}: must say what holds the pods of the policy's {role} pool, "
                "such as StatefulSet/pdserve-" + role
            )
    return targets


async def _scale(config: Config, place: ScalerPlace, targets: dict[Role, Target]) -> int:
    with open_kubernetes(config) as client:
        return await _campaign(config, place, targets, client)


async def _campaign(config: Config, place: ScalerPlace, targets: dict[Role, Target], client: "KubeClient") -> int:
    identity = os.environ.get("POD_NAME") or f"{socket.gethostname()}-{token_hex(4)}"
    seconds = config.times.scaler_lease
    election = Election(client, config.scaler.kubernetes.lease, identity, SystemClock(), seconds=seconds)
    term = _Term(config, place, targets, client, election)
    listener = bind(place.host, place.probe_port)
    stop, force = signals()
    async with running(serve_http(_probes(election, term), listener, asyncio.Event(), _STOP_GRACE)):
        campaign = asyncio.create_task(election.run(term.run))
        await first(stop, campaign)
        campaign.cancel()
        await first(force, campaign)
    if campaign.done() and not campaign.cancelled():
        campaign.result()
    return EXIT_FORCED if force.is_set() else 0


class _Term:
    """What one leader does: hears gateways and scales, beginning with the pools as they are."""

    def __init__(
        self, config: Config, place: ScalerPlace, targets: dict[Role, Target], client: "KubeClient", election: Election
    ) -> None:
        self._config = config
        self._place = place
        self._targets = targets
        self._client = client
        self._election = election
        self.scaling: Scaling | None = None
        """While it leads."""

    async def run(self) -> None:
        clock = SystemClock()
        cloud = PodCloud(self._client, self._targets, clock, self._election.leads)
        announcer = Announcer(self._client, self._targets, self._election.identity, clock)
        scaling = Scaling(
            Path(str(self._config.policies)),
            cloud,
            clock,
            see=cloud.look,
            done=lambda decision, failure: announcer.offer(decision, failure, cloud.held),
            refuse=refuse_flips,
        )
        server = self._serve(scaling)
        await server.start()
        self.scaling = scaling
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(announcer.run())
                group.create_task(scaling.run())
        finally:
            self.scaling = None
            await server.stop(None)

    def _serve(self, scaling: Scaling) -> grpc.aio.Server:
        server, host, port = new_server(), self._place.host, self._config.scaler.port
        scaling.register(server)
        try:
            server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(
                f"scaler.port: cannot listen on {host}:{port}; stop its owner or choose another"
            ) from None
        return server


def _probes(election: Election, term: _Term) -> Starlette:
    registry = CollectorRegistry()
    leader = Gauge(*LEADER, registry=registry)
    leader.set_function(lambda: float(election.leads()))
    registry.register(ScalerCollector(lambda: term.scaling.figures() if term.scaling else None))

    async def live(request: Request) -> JSONResponse:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> JSONResponse:
        leads = term.scaling is not None and election.leads()
        body = {"status": "leader" if leads else "standby", "leader": election.holder}
        return JSONResponse(body, status_code=200 if leads else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)

    return Starlette(routes=[Route("/live", live), Route("/ready", ready), Route("/metrics", metrics)])
