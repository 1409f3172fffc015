"""`pdserve serve`: the parent of engines and gateway. Never imports torch."""

import asyncio

from pdserve.cluster.launcher import Launcher
from pdserve.cluster.member import Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.registry import EngineOrder, Registry
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import GATEWAY, desired
from pdserve.launch.launchers import open_launcher
from pdserve.launch.ports import settle_ports
from pdserve.launch.running import run_until_signal
from pdserve.launch.welcome import until_answering, welcome
from pdserve.telemetry.logs import configure_logs


def serve(config: Config) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; the exit code. Raises ConfigError for input that cannot work."""
    check_model(config)
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_serve(settle_ports(config)))


async def _serve(config: Config) -> int:
    async with open_launcher(config) as launcher:
        return await supervise(config, launcher)


async def supervise(config: Config, launcher: Launcher) -> int:
    """Serve with an open launcher and settled ports until a signal; the exit code."""
    registry = Registry()
    await registry.start()
    supervisor = Supervisor(
        desired(config, registry.address),
        launcher,
        times=config.times,
        clock=SystemClock(),
        on_change=registry.publish,
    )
    registry.obey = lambda engine_id, order: _obey(supervisor, engine_id, order)
    greeting = asyncio.create_task(_greet(config, supervisor))
    try:
        return await run_until_signal(supervisor, config.times)
    finally:
        greeting.cancel()
        await asyncio.gather(greeting, return_exceptions=True)
        await registry.stop()


def _obey(supervisor: Supervisor, engine_id: str, order: EngineOrder) -> None:
    if order is EngineOrder.RETURN:
        supervisor.return_engine(engine_id)
    else:
        supervisor.drain_engine(engine_id, returns=order is EngineOrder.RESTART)


async def _greet(config: Config, supervisor: Supervisor) -> None:
    """Print the ready line once everything is up and a client would be served."""

    def all_ready(members: Members) -> bool:
        return all(member.phase is Phase.READY for member in members.values())

    await supervisor.until(all_ready)
    address = supervisor.members[GATEWAY].address
    await until_answering(address, "/ready")
    print(welcome(config, address), flush=True)
