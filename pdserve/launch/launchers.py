"""The configured launcher."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pdserve.cluster.launcher import Launcher
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.ray_launcher import RayLauncher
from pdserve.config import schema
from pdserve.config.schema import Config
from pdserve.core.endpoint import Role
from pdserve.scaler.load import load_policy


@asynccontextmanager
async def open_launcher(config: Config) -> AsyncIterator[Launcher]:
    """Raises ConfigError when Ray is wanted and not installed, or a scaling policy cannot work."""
    name_lines = config.log.format == "console"
    if config.launcher is schema.Launcher.PROCESS or config.only == "router":
        yield ProcessLauncher(name_lines=name_lines)
        return
    pools = config.pools.by_role()
    most = most_engines(config)
    cpus = sum(count * pools[role].hosts * pools[role].cpus for role, count in most.items())
    async with RayLauncher(config.ray, cpus=cpus, engines=sum(most.values()), name_lines=name_lines) as launcher:
        yield launcher


def most_engines(config: Config) -> dict[Role, int]:
    """Of each role there may come to be. Raises ConfigError for a scaling policy that cannot work."""
    most = {role: pool.engines for role, pool in config.pools.by_role().items()}
    if config.policies is None:
        return most
    for role, pool in load_policy(Path(config.policies)).pools.by_role().items():
        most[role] = max(most[role], pool.max, *(schedule.max or 0 for schedule in pool.schedules))
    return most
