"""Launcher of processes on a Ray cluster.

Each is the child of one actor (cluster.ray_host). Its placement group is its own, or its gang's: room is
granted to a process and its followers together. Ray only finds the place and reports deaths:
`max_restarts=0`, because the supervisor alone decides what is started again and under which epoch. A
process without resources, such as the gateway, runs beside the supervisor instead.
"""

import asyncio
import math
from collections.abc import Mapping
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import structlog

from pdserve.cluster.gang import LaunchedGang, followers_of
from pdserve.cluster.launcher import Launched, LaunchSpec, Resources
from pdserve.cluster.process_launcher import ProcessLauncher, line_prefix
from pdserve.cluster.ray_actor import HostedProcess, Place, leave_places, start_child, take_room
from pdserve.cluster.ray_cluster import RayCluster, cluster_resources, require_ray
from pdserve.config.schema import RayConfig
from pdserve.core.errors import ConfigError, EngineDied

PATIENCE = 10.0
"""Seconds without room in the cluster before we say what we are waiting for."""
_MIN_CPUS = 0.001
"""Ray grants no room to a group that asks for nothing."""

_log = structlog.get_logger(__name__)


class RayLauncher:
    """The `ray` launcher. Leaving it as a context ends a cluster of its own.

    The cluster is opened by the first launch that needs it, and opened again when it was lost. engines
    share what it has: at least cpus in total, and its GPUs evenly unless a spec says otherwise.
    """

    def __init__(self, config: RayConfig, *, cpus: float, engines: int, name_lines: bool = True) -> None:
        require_ray()
        self._config = config
        self._cpus = cpus
        self._engines = engines
        self._name_lines = name_lines
        self._local = ProcessLauncher(name_lines=name_lines)
        self._cluster: RayCluster | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster:
            await cluster.close()

    async def launch(self, spec: LaunchSpec) -> Launched:
        if spec.resources is None:
            return await self._local.launch(spec)
        cluster = await self._open_cluster()
        bundles = self._bundles(spec, spec.resources, await cluster.call(cluster_resources))
        strategy = self._strategy(spec)
        needs = {"each": bundles, "placed": strategy} if spec.followers else bundles[0]
        placing = asyncio.ensure_future(cluster.call(take_room, spec.name, bundles, strategy))
        try:
            places = await asyncio.shield(placing)
            members = await self._start_all(cluster, places, spec, needs)
        except BaseException:
            await leave_places(await placing, cluster)
            raise
        return LaunchedGang(spec, members) if spec.followers else members[0]

    def _bundles(self, spec: LaunchSpec, resources: Resources, offered: dict[str, float]) -> list[dict[str, float]]:
        """One for each process; a fair share is one process's, as if every engine had as many."""
        wanted = [resources, *(follower.resources or resources for follower in spec.followers)]
        return [bundle_for(each, offered, self._engines * len(wanted)) for each in wanted]

    def _strategy(self, spec: LaunchSpec) -> str:
        """A gang is spread because one machine is too small for it; in a cluster of our own there is no other one."""
        return "STRICT_SPREAD" if spec.followers and self._config.address is not None else "STRICT_PACK"

    async def _open_cluster(self) -> RayCluster:
        async with self._opening:
            if self._cluster and self._cluster.lost.is_set():
                _log.error("the Ray cluster is lost, starting another")
                lost, self._cluster = self._cluster, None
                await lost.close()
            if self._cluster is None:
                self._cluster = await RayCluster.open(self._config, cpus=self._cpus, launcher=self._local)
            return self._cluster

    async def _start_all(
        self, cluster: RayCluster, places: list[Place], spec: LaunchSpec, needs: Mapping[str, Any]
    ) -> list[HostedProcess]:
        """The process and its followers. Room is granted to all at once, so that only the first waits for it."""
        facts = [await self._start(cluster, places[0], spec, needs)]
        started = [spec, *followers_of(spec, facts[0].get("door", ""))]
        for place, follower in zip(places[1:], started[1:], strict=True):
            facts.append(await self._start(cluster, place, follower, needs))
        return [
            HostedProcess(each.name, told["pid"], place, cluster, line_prefix(each.name) if self._name_lines else "")
            for each, told, place in zip(started, facts, places, strict=True)
        ]

    async def _start(
        self, cluster: RayCluster, place: Place, spec: LaunchSpec, needs: Mapping[str, Any]
    ) -> dict[str, Any]:
        starting = asyncio.create_task(start_child(place, spec))
        lost = asyncio.create_task(cluster.lost.wait())
        try:
            done, _ = await asyncio.wait([starting, lost], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                _log.warning("waiting for room in the Ray cluster", process=spec.name, needs=needs)
                await asyncio.wait([starting, lost], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise EngineDied(f"the Ray cluster was lost before {spec.name} was started")
            facts = starting.result()
        finally:
            starting.cancel()
            lost.cancel()
        ours = version("pdserve")
        if facts["version"] != ours:
            raise ConfigError(
                f"a Ray node has pdserve {facts['version']} and this machine {ours}; "
                "install the same version on all of them"
            )
        return facts


def bundle_for(wanted: Resources, offered: dict[str, float], engines: int) -> dict[str, float]:
    """Ray's resources for one process, in a cluster that offers so much to so many engines."""
    gpus = fair_share(offered.get("GPU", 0.0), engines) if wanted.gpus is None else wanted.gpus
    bundle = {"CPU": wanted.cpus, "GPU": gpus, **wanted.custom}
    return {name: amount for name, amount in bundle.items() if amount} or {"CPU": _MIN_CPUS}


def fair_share(gpus: float, engines: int) -> float:
    """GPUs per engine: a whole one each while there are enough, else equal parts of one."""
    if gpus < 1:
        return 0.0
    per_gpu = math.ceil(engines / gpus)
    return 1.0 if per_gpu <= 1 else math.floor(10_000 / per_gpu) / 10_000  # Ray counts in ten-thousandths
