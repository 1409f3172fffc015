"""The configured launcher."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pdserve.cluster.launcher import Launcher
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.ray_launcher import RayLauncher
from pdserve.config import schema
from pdserve.config.schema import Config


@asynccontextmanager
async def open_launcher(config: Config) -> AsyncIterator[Launcher]:
    """Raises ConfigError when Ray is wanted and not installed."""
    name_lines = config.log.format == "console"
    if config.launcher is schema.Launcher.PROCESS or config.only == "router":
        yield ProcessLauncher(name_lines=name_lines)
        return
    pools = config.pools.by_role().values()
    cpus = sum(pool.engines * pool.cpus for pool in pools)
    engines = sum(pool.engines for pool in pools)
    async with RayLauncher(config.ray, cpus=cpus, engines=engines, name_lines=name_lines) as launcher:
        yield launcher
