"""`pdserve serve`: the parent of engines and gateway. Never imports torch."""

import asyncio
import signal
from functools import partial
from pathlib import Path

import structlog

from pdserve.cluster.cloud import SupervisedCloud
from pdserve.cluster.launcher import Launcher
from pdserve.cluster.member import Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.registry import EngineOrder, Registry
from pdserve.cluster.scaling import Scaling
from pdserve.cluster.supervisor import Supervisor
from pdserve.config.schema import Config
from pdserve.core.clock import SystemClock
from pdserve.core.errors import ConfigError
from pdserve.launch.deployment import GATEWAY, desired, engine, unflippable
from pdserve.launch.launchers import open_launcher
from pdserve.launch.ports import settle_ports
from pdserve.launch.welcome import until_answering, welcome
from pdserve.telemetry.logs import configure_logs

EXIT_FORCED = 130
_log = structlog.get_logger(__name__)


def serve(config: Config) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; the exit code. Raises ConfigError for input that cannot work."""
    if not (config.model_path / "config.json").is_file():
        raise ConfigError(f"model: {config.model_path} has no config.json; give a Hugging Face checkpoint directory")
    configure_logs(json=config.log.format == "json", level=config.log.level)
    return asyncio.run(_serve(settle_ports(config)))


async def _serve(config: Config) -> int:
    async with open_launcher(config) as launcher:
        return await supervise(config, launcher)


async def supervise(config: Config, launcher: Launcher) -> int:
    """Serve with an open launcher and settled ports until a signal; the exit code."""
    registry = Registry()
    supervisor = Supervisor(
        desired(config, registry.address),
        launcher,
        times=config.times,
        clock=SystemClock(),
        on_change=registry.publish,
    )
    registry.obey = lambda engine_id, order: _obey(supervisor, engine_id, order)
    scaling = _scaling(config, supervisor)
    if scaling:
        registry.add(scaling.register)
    await registry.start()
    stop, force = _signals()
    run = asyncio.create_task(supervisor.run())
    greeting = asyncio.create_task(_greet(config, supervisor, scaling))
    try:
        await _first(run, stop)
        greeting.cancel()
        if not run.done():
            _log.info("draining: running requests finish; Ctrl-C again ends them", timeout=config.times.drain_timeout)
            drain = asyncio.create_task(supervisor.drain())
            await _first(drain, force)
            drain.cancel()
        forced = force.is_set()
        if forced:
            run.cancel()
        await asyncio.wait([run])
        if not forced:
            run.result()
        return EXIT_FORCED if forced else 0
    finally:
        greeting.cancel()
        run.cancel()
        await asyncio.gather(run, greeting, return_exceptions=True)
        await registry.stop()


def _obey(supervisor: Supervisor, engine_id: str, order: EngineOrder) -> None:
    if order is EngineOrder.RETURN:
        supervisor.return_engine(engine_id)
    else:
        supervisor.drain_engine(engine_id, returns=order is EngineOrder.RESTART)


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first and of the second request to end."""
    stop, force = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (force if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, force


async def _first(task: "asyncio.Task[None]", event: asyncio.Event) -> None:
    """Return when the task has ended or the event is set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _scaling(config: Config, supervisor: Supervisor) -> Scaling | None:
    """Raises ConfigError for a policy that cannot work."""
    if config.policies is None:
        return None
    cloud = SupervisedCloud(supervisor, partial(engine, config), flippable=unflippable(config))
    return Scaling(Path(config.policies), cloud, SystemClock())


async def _greet(config: Config, supervisor: Supervisor, scaling: Scaling | None) -> None:
    """Print the ready line once everything is up and a client would be served; from then on, scale."""

    def all_ready(members: Members) -> bool:
        return all(member.phase is Phase.READY for member in members.values())

    await supervisor.until(all_ready)
    address = supervisor.members[GATEWAY].address
    await until_answering(address, "/ready")
    print(welcome(config, address), flush=True)
    if scaling:
        await scaling.run()
