"""`pdserve route`: the parent of a gateway that serves engines started elsewhere. Never imports torch."""

import asyncio
from functools import partial

from pdserve.cluster.discovery import Discovery, introductions_at
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.registry import EngineOrder, Registry
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import ConfigError, Unsupported
from pdserve.core.tasks import running
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import desired_gateway
from pdserve.launch.fronts import front_socket
from pdserve.launch.ports import settle_ports
from pdserve.launch.routers import open_link
from pdserve.launch.running import run_until_signal
from pdserve.model.checkpoint import model_revision
from pdserve.telemetry.logs import configure_logs


def route(config: Config) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; the exit code. Raises ConfigError, CheckpointError for input that
    cannot work."""
    if not config.discovery.engines:
        raise ConfigError(
            "discovery.engines: names no engine; give host:port of those that `pdserve engine` has started, "
            "or start everything here with `pdserve serve`"
        )
    check_model(config)
    revision = model_revision(config.model_path)
    open_link(config, SystemClock())  # refused here, not in a child that is started again and again
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_route(settle_ports(config), revision))


async def _route(config: Config, revision: str) -> int:
    with front_socket(config) as socket:
        return await _supervise(config, socket, revision)


async def _supervise(config: Config, socket: str, revision: str) -> int:
    clock = SystemClock()
    registry = Registry()
    registry.obey = _refuse
    await registry.start()
    supervisor = Supervisor(
        desired_gateway(config, registry.address, socket=socket),
        ProcessLauncher(name_lines=config.log.format == "console"),
        times=config.times,
        clock=clock,
        on_change=_none,
    )
    discovery = Discovery(
        config.discovery.engines,
        times=config.times,
        clock=clock,
        on_change=registry.publish,
        introductions=partial(introductions_at, revision=revision),
    )
    try:
        async with running(discovery.run()):
            return await run_until_signal(supervisor, config.times)
    finally:
        await registry.stop()


def _refuse(engine_id: str, order: EngineOrder) -> None:
    raise Unsupported(
        f"{engine_id[:200]} was started elsewhere: end it where it runs, with SIGTERM or by deleting its pod; "
        "it drains first"
    )


def _none(endpoints: tuple[Endpoint, ...]) -> None:
    """This supervisor has no engines to tell of."""
