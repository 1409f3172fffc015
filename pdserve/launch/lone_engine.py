"""`pdserve engine`: the parent of one engine that `pdserve route` finds by its address. Never imports torch.

The parent starts the engine again when it dies and kills it when it is silent, as `pdserve serve` does with all of its
engines, and answers probes: GET /live while it runs, GET /ready while its engine takes requests.
"""

import asyncio
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pdserve.cluster.member import Phase
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, Role
from pdserve.gateway.serve import bind, serve_http
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import desired_engine
from pdserve.launch.running import run_until_signal
from pdserve.telemetry.logs import configure_logs

_STOP_GRACE = 1.0
"""Seconds for a probe's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Who the engine is, and where. host and port are where gateways and other engines reach it, probe_port is where
    probes are answered."""

    name: str
    role: Role
    host: str
    port: int
    probe_port: int


def run_engine(config: Config, place: EnginePlace) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP, drain, return the exit code. Raises ConfigError for input that cannot
    work."""
    check_model(config)
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_run(config, place))


async def _run(config: Config, place: EnginePlace) -> int:
    supervisor = Supervisor(
        [desired_engine(config, place.name, place.role, place.host, place.port)],
        ProcessLauncher(name_lines=config.log.format == "console"),
        times=config.times,
        clock=SystemClock(),
        on_change=_none,
    )
    stop = asyncio.Event()
    listener = bind(place.host, place.probe_port)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_http(_probes(supervisor, place.name), listener, stop, _STOP_GRACE))
        code = await run_until_signal(supervisor, config.times)
        stop.set()
    return code


def _probes(supervisor: Supervisor, name: str) -> Starlette:
    async def live(request: Request) -> JSONResponse:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> JSONResponse:
        phase = supervisor.members[name].phase
        return JSONResponse({"status": phase.value}, status_code=200 if phase is Phase.READY else 503)

    return Starlette(routes=[Route("/live", live), Route("/ready", ready)])


def _none(endpoints: tuple[Endpoint, ...]) -> None:
    """Gateways find the engine by its address."""
