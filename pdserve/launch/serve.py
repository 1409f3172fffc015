"""`pdserve serve`: the parent of engines and gateway. Never imports torch."""

import asyncio
from functools import partial
from pathlib import Path
from secrets import token_hex

from pdserve.cluster.cloud import SupervisedCloud
from pdserve.cluster.launcher import Launcher
from pdserve.cluster.member import Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.registry import EngineOrder, Registry
from pdserve.cluster.scaling import Scaling
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import GATEWAY, desired, engine, unflippable
from pdserve.launch.fronts import front_socket
from pdserve.launch.launchers import open_launcher
from pdserve.launch.ports import settle_ports
from pdserve.launch.routers import announcing
from pdserve.launch.running import run_until_signal
from pdserve.launch.welcome import until_answering, welcome, welcome_without_router
from pdserve.telemetry.logs import configure_logs


def serve(config: Config) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; the exit code. Raises ConfigError for input that cannot work."""
    check_model(config)
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_serve(config if config.only == "engines" else settle_ports(config)))


async def _serve(config: Config) -> int:
    async with open_launcher(config) as launcher:
        return await supervise(config, launcher)


async def supervise(config: Config, launcher: Launcher) -> int:
    """Serve with an open launcher and settled ports until a signal; the exit code."""
    clock, owner = SystemClock(), token_hex(8)
    registry = Registry()
    try:
        with front_socket(config) as socket:
            async with announcing(config, owner, clock) as announce:

                def publish(endpoints: tuple[Endpoint, ...]) -> None:
                    registry.publish(endpoints)
                    announce(endpoints)

                wanted = desired(config, registry.address, owner, socket)
                supervisor = Supervisor(wanted, launcher, times=config.times, clock=clock, on_change=publish)
                return await _run(config, supervisor, registry)
    finally:
        await registry.stop()


async def _run(config: Config, supervisor: Supervisor, registry: Registry) -> int:
    registry.obey = lambda engine_id, order: _obey(supervisor, engine_id, order)
    scaling = _scaling(config, supervisor)
    if scaling:
        registry.add(scaling.register)
    await registry.start()
    greeting = asyncio.create_task(_greet(config, supervisor, scaling))
    try:
        return await run_until_signal(supervisor, config.times, on_drain=greeting.cancel)
    finally:
        greeting.cancel()
        await asyncio.gather(greeting, return_exceptions=True)


def _obey(supervisor: Supervisor, engine_id: str, order: EngineOrder) -> None:
    if order is EngineOrder.RETURN:
        supervisor.return_engine(engine_id)
    else:
        supervisor.drain_engine(engine_id, returns=order is EngineOrder.RESTART)


def _scaling(config: Config, supervisor: Supervisor) -> Scaling | None:
    """Raises ConfigError for a policy that cannot work."""
    if config.policies is None:
        return None
    cloud = SupervisedCloud(
        supervisor, partial(engine, config), prefix=config.engine_prefix, flippable=unflippable(config)
    )
    return Scaling(Path(config.policies), cloud, SystemClock())


async def _greet(config: Config, supervisor: Supervisor, scaling: Scaling | None) -> None:
    """Print the ready line once everything is up and a client would be served; from then on, scale."""

    def all_ready(members: Members) -> bool:
        return all(member.phase is Phase.READY for member in members.values())

    await supervisor.until(all_ready)
    if config.only == "engines":
        print(welcome_without_router(config), flush=True)
        return
    address = supervisor.members[GATEWAY].address
    await until_answering(address, "/ready")
    print(welcome(config, address), flush=True)
    if scaling:
        await scaling.run()
