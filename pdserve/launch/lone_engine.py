"""`pdserve engine`: the parent of one engine that `pdserve route` finds by its address. Never imports torch.

The parent starts the engine again when it dies and kills it when it is silent, as `pdserve serve` does with all of its
engines, and answers probes: GET /live while it runs, GET /ready while its engine takes requests.
"""

import asyncio
from dataclasses import dataclass

from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, Role
from pdserve.core.tasks import running
from pdserve.gateway.serve import bind, serve_http
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import desired_engine
from pdserve.launch.probes import STOP_GRACE, probes
from pdserve.launch.running import run_until_signal
from pdserve.telemetry.logs import configure_logs


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Who the engine is, and where. host and port are where gateways and other engines reach it, probe_port is where
    probes are answered, gang_port where the hosts of ranks come to that are not on this machine."""

    name: str
    role: Role
    host: str
    port: int
    probe_port: int
    gang_port: int


def run_engine(config: Config, place: EnginePlace) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP, drain, return the exit code. Raises ConfigError for input that cannot
    work."""
    check_model(config)
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_run(config, place))


async def _run(config: Config, place: EnginePlace) -> int:
    supervisor = Supervisor(
        [desired_engine(config, place.name, place.role, place.host, place.port, place.gang_port)],
        ProcessLauncher(name_lines=config.log.format == "console"),
        times=config.times,
        clock=SystemClock(),
        on_change=_none,
    )
    listener = bind(place.host, place.probe_port)
    answers = probes(lambda: supervisor.members[place.name].phase.value)
    async with running(serve_http(answers, listener, asyncio.Event(), STOP_GRACE)):
        return await run_until_signal(supervisor, config.times)


def _none(endpoints: tuple[Endpoint, ...]) -> None:
    """Gateways find the engine by its address."""
