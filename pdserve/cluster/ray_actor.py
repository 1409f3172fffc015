"""The supervisor's side of one Ray actor and the process it hosts."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog

from pdserve.cluster.launcher import LaunchSpec
from pdserve.cluster.process_launcher import write_line
from pdserve.cluster.ray_cluster import RayCluster
from pdserve.cluster.ray_host import RayHost
from pdserve.core.errors import EngineDied, from_wire

_KILL_ANSWER = 2.0
"""Seconds for a host to end its child before Ray is told to end the host itself."""
_KILL_GIVE_UP = 10.0
"""Seconds for Ray to do so before the process counts as lost."""
_RECONNECT = 0.1
"""Seconds after the line to a host broke."""
_LAST_WORDS = 1.0
"""Seconds for the answer and log of a process that has ended."""
_LOST = -signal.SIGKILL

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """An actor, and the room it is in, alone or with the others of its gang."""

    host: Any
    room: "Room"


class Room:
    """A placement group with an actor in every bundle; it is given back once all of them have left."""

    def __init__(self, group: Any, hosts: Sequence[Any]) -> None:
        self.group = group
        self.places = [Place(host, self) for host in hosts]
        self._inside = set(self.places)

    def left_by(self, place: Place) -> bool:
        """Whether it was the last to leave; each leaves once, however often it is told to."""
        if place not in self._inside:
            return False
        self._inside.remove(place)
        return not self._inside


def take_room(name: str, bundles: Sequence[dict[str, float]], strategy: str) -> list[Place]:
    """Ask Ray for room and an actor in each bundle of it; they are there before all is granted at once.
    Blocks for a moment."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(bundles), strategy=strategy, name=name)
    try:
        return Room(group, [_host(group, index, bundle) for index, bundle in enumerate(bundles)]).places
    except BaseException:
        remove_placement_group(group)
        raise


def _host(group: Any, index: int, bundle: dict[str, float]) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = {
        "max_restarts": 0,
        "max_task_retries": 0,
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "resources": {key: amount for key, amount in bundle.items() if key not in ("CPU", "GPU")},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }
    return ray.remote(RayHost).options(**options).remote()


async def start_child(place: Place, spec: LaunchSpec) -> dict[str, Any]:
    """Start the process alone once there is room; RayHost.lead's facts if it has followers, else RayHost.start's.
    Raises EngineDied when that fails."""
    import ray

    start = place.host.lead if spec.followers else place.host.start
    try:
        facts: dict[str, Any] = await start.remote(spec.name, spec.module, dict(spec.payload), spec.threads)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise EngineDied(f"Ray could not start {spec.name}: {last_line}") from error
    return facts


async def leave_places(places: Sequence[Place], cluster: RayCluster) -> None:
    """End the actors, their processes with them, and give back the room nobody is left in; a cluster that fails has
    done so."""
    if not cluster.lost.is_set():
        with suppress(EngineDied):
            await cluster.call(_leave, places)


def _leave(places: Sequence[Place]) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    for place in places:
        ray.kill(place.host, no_restart=True)
        if place.room.left_by(place):
            remove_placement_group(place.room.group)


class HostedProcess:
    """launcher.Launched for a process hosted by an actor. Its place is given back when it has ended."""

    def __init__(self, name: str, pid: int, place: Place, cluster: RayCluster, prefix: str) -> None:
        self._name = name
        self._pid = pid
        self._place = place
        self._cluster = cluster
        self._given_up = asyncio.Event()
        self._killing: asyncio.Task[None] | None = None
        self._answer = asyncio.create_task(self._ask("ready"))
        self._copying = asyncio.create_task(self._copy_log(prefix))
        self._end = asyncio.create_task(self._until_ended())

    @property
    def pid(self) -> int:
        return self._pid

    async def ready(self) -> dict[str, Any]:
        await asyncio.wait([self._answer, self._end], return_when=asyncio.FIRST_COMPLETED)
        match self._answer.result() if self._answer.done() else None:
            case {"ready": dict() as facts}:
                return facts
            case {"error": {"code": str() as code, "message": str() as message}}:
                raise from_wire(code, message)
        raise EngineDied(f"{self._name} was lost with its Ray actor or node before it was ready")

    async def ended(self) -> int:
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        if not self._end.done():
            self._place.host.terminate.remote()

    def kill(self) -> None:
        if not self._end.done() and self._killing is None:
            self._place.host.kill.remote()
            self._killing = asyncio.create_task(self._insist())

    async def _insist(self) -> None:
        """A host that is frozen or cannot be reached ends no child: have Ray end the host."""
        await asyncio.wait([self._end], timeout=_KILL_ANSWER)
        if self._end.done():
            return
        await leave_places([self._place], self._cluster)
        await asyncio.wait([self._end], timeout=_KILL_GIVE_UP)
        self._given_up.set()

    async def _until_ended(self) -> int:
        code = await self._exit_code()
        if code is None:
            _log.warning("lost with its Ray actor or node", process=self._name, pid=self._pid)
        await asyncio.wait([self._answer, self._copying], timeout=_LAST_WORDS)
        for task in (self._answer, self._copying):
            task.cancel()
        await leave_places([self._place], self._cluster)
        return _LOST if code is None else code

    async def _exit_code(self) -> int | None:
        """None when the process is lost: nobody is left to tell."""
        asked = asyncio.create_task(self._ask("ended"))
        without = [asyncio.create_task(event.wait()) for event in (self._given_up, self._cluster.lost)]
        try:
            await asyncio.wait([asked, *without], return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            for task in (asked, *without):
                task.cancel()

    async def _ask(self, method: str) -> Any:
        """What the host answers; None when it is gone."""
        import ray

        while True:
            try:
                return await getattr(self._place.host, method).remote()
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RECONNECT)  # the next call waits until Ray knows whether the actor lives
            except ray.exceptions.RayError:
                return None

    async def _copy_log(self, prefix: str) -> None:
        while lines := await self._ask("lines"):
            await asyncio.to_thread(_write_lines, prefix, lines)


def _write_lines(prefix: str, lines: list[str]) -> None:
    for line in lines:
        write_line(prefix + line)
