"""`pdserve serve`: the parent of engines and gateway. Never imports torch."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex

from pdserve.cluster.cloud import SupervisedCloud
from pdserve.cluster.k8s.nodes import NodedCloud
from pdserve.cluster.k8s.target import targets_of
from pdserve.cluster.launcher import Launcher
from pdserve.cluster.member import Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.registry import EngineOrder, Registry
from pdserve.cluster.scaling import Scaling
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint
from pdserve.core.errors import ConfigError
from pdserve.core.tasks import running
from pdserve.launch.checks import check_model
from pdserve.launch.deployment import GATEWAY, desired, engine, unflippable
from pdserve.launch.fronts import front_socket
from pdserve.launch.kubernetes import open_kubernetes
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
    with _scaling(config, supervisor) as scaling:
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


@contextmanager
def _scaling(config: Config, supervisor: Supervisor) -> Iterator[Scaling | None]:
    """None without a policy. Raises ConfigError for one that cannot work."""
    if config.scaler.address:
        raise ConfigError("scaler.address: is for gateways of `pdserve route`; `serve` has its own scaler (policies)")
    if config.policies is None:
        yield None
        return
    engines = SupervisedCloud(
        supervisor, partial(engine, config), prefix=config.engine_prefix, flippable=unflippable(config)
    )
    targets = targets_of(config.scaler.kubernetes)
    if not targets:
        yield Scaling(Path(config.policies), engines, SystemClock())
        return
    if any(target.kind == "Deployment" for target in targets.values()):
        raise ConfigError(
            "scaler.kubernetes: a Deployment lets go of any Ray node, also of one with an engine; use a StatefulSet "
            "or a RayCluster"
        )
    with open_kubernetes(config) as client:
        nodes = NodedCloud(engines, lambda: supervisor.members, client, targets)
        yield Scaling(Path(config.policies), nodes, SystemClock(), see=nodes.look)


async def _greet(config: Config, supervisor: Supervisor, scaling: Scaling | None) -> None:
    """Print the ready line once everything is up and a client would be served; from then on, scale."""

    def all_ready(members: Members) -> bool:
        return all(member.phase is Phase.READY for member in members.values())

    async with running(*([scaling.prepare()] if scaling else [])):
        await supervisor.until(all_ready)
    if config.only == "engines":
        print(welcome_without_router(config), flush=True)
        return
    address = supervisor.members[GATEWAY].address
    await until_answering(address, "/ready")
    print(welcome(config, address), flush=True)
    if scaling:
        await scaling.run()
