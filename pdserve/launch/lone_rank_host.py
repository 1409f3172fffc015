"""`pdserve rank-host`: starts an engine's ranks in a pod beside that of its `pdserve engine`. Never imports torch."""

import asyncio
from dataclasses import dataclass

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError, MalformedMessage
from pdserve.gateway.serve import bind, serve_http
from pdserve.launch.probes import READY, STOP_GRACE, probes
from pdserve.launch.running import EXIT_FORCED, first, signals
from pdserve.telemetry.logs import configure_logs
from pdserve.worker.rank_host import RankHost


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlace:
    """Which host it is of which engine: number as in worker.hosting.Introduction, leader the engine's host:port for it.
    host is the address at which the engine's other ranks reach these."""

    number: int
    leader: str
    host: str
    probe_port: int


def run_rank_host(config: Config, place: HostPlace) -> int:
    """Serve the engine's incarnations until SIGINT, SIGTERM or SIGHUP, then let the engine drain; the exit code. A
    second signal ends it at once. Raises ConfigError."""
    configure_logs(json=config.log.format == "json", level=config.log.level)
    try:
        ranks = RankHost(place.leader, place.number, place.host)
    except MalformedMessage as error:
        raise ConfigError(f"--leader: {error}") from error
    return asyncio.run(_run(ranks, place))


async def _run(ranks: RankHost, place: HostPlace) -> int:
    stop, force = signals()
    listener = bind(place.host, place.probe_port)
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        status = probes(lambda: READY if ranks.serves else "waiting for its engine")
        group.create_task(serve_http(status, listener, ended, STOP_GRACE))
        serving = asyncio.create_task(ranks.run(stop))
        await first(force, serving)
        if forced := not serving.done():
            serving.cancel()
        await asyncio.wait([serving])
        ended.set()
    if not forced:
        serving.result()
    return EXIT_FORCED if forced else 0
