"""Ray nodes in pods: there are as many as the engines that a supervisor places on them need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from pdserve.cluster.k8s.cloud import scale_to
from pdserve.cluster.k8s.pods import Pod, PodState, state_of
from pdserve.cluster.k8s.target import Held, Target
from pdserve.cluster.member import Member, Phase
from pdserve.cluster.plan import Members
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError, PdserveError
from pdserve.scaler.decision import Replicas
from pdserve.scaler.runner import Cloud

if TYPE_CHECKING:
    from pdserve.cluster.k8s.client import KubeClient

_ON_A_NODE = (Phase.READY, Phase.SUSPECT, Phase.DRAINING)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A pod that is a Ray node, or will be one."""

    name: str
    ip: str
    state: PodState

    @property
    def number(self) -> int:
        """Among those of its StatefulSet, which lets go of the highest first."""
        number = self.name.rpartition("-")[2]
        return int(number) if number.isdecimal() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What holds the nodes of a role, and those nodes."""

    held: Held
    nodes: tuple[Node, ...]


def nodes_of(pods: Iterable[Pod]) -> tuple[Node, ...]:
    """Those that are to stay."""
    found = (
        Node(name=pod["metadata"]["name"], ip=pod.get("status", {}).get("podIP", ""), state=state_of(pod))
        for pod in pods
    )
    return tuple(node for node in found if node.state is not PodState.GONE)


def needed(role: Role, target: Target, pools: Mapping[Role, Pool], members: Iterable[Member]) -> int:
    """Nodes of a role: those with an engine, whatever its role is by now, and one for each engine that has none yet. Of
    a StatefulSet none below a node with an engine can leave, and none at all while an engine of the role starts."""
    engines = [each for each in members if each.role is not None and each.phase is not Phase.STOPPED]
    taken = {_host(each) for each in engines if each.phase in _ON_A_NODE}
    known = {node.ip for pool in pools.values() for node in pool.nodes if node.ip}
    homeless = [each for each in engines if each.phase not in _ON_A_NODE or _host(each) not in known]
    occupied = [node for node in pools[role].nodes if node.ip in taken]
    count = len(occupied) + sum(each.role is role for each in homeless)
    highest = max((node.number + 1 for node in occupied), default=0) if target.kind == "StatefulSet" else 0
    # On which node it starts is known when it is ready, so any that looks idle may be its own; until then, or until
    # times.start_timeout kills it, all stay.
    starts = any(each.role is role and each.phase is Phase.STARTING for each in engines)
    return max(count, highest, pools[role].held.replicas if starts else 0)


def _host(member: Member) -> str:
    return member.address.rpartition(":")[0]


class NodedCloud:
    """scaler.runner.Cloud of a supervisor's engines and the nodes under them. A node goes when no engine is on it."""

    def __init__(
        self,
        engines: Cloud,
        members: Callable[[], Members],
        client: "KubeClient",
        targets: Mapping[Role, Target],
    ) -> None:
        """Raises ConfigError for targets whose pods are no Ray nodes."""
        if any(target.kind == "LeaderWorkerSet" for target in targets.values()):
            raise ConfigError(
                "scaler.kubernetes: a LeaderWorkerSet holds engines, which `pdserve scale` scales; of Ray nodes name a "
                "StatefulSet or a RayCluster"
            )
        self._engines = engines
        self._members = members
        self._client = client
        self._targets = targets
        self._nodes: dict[Role, Pool] = {}
        self._trouble = ""

    async def look(self) -> None:
        """See what nodes there are, and let their number follow. Raises Unavailable or Denied when none are seen."""
        seen = {}
        for role, target in self._targets.items():
            held = await self._client.look(target)
            seen[role] = Pool(held=held, nodes=nodes_of(await self._client.pods(held.selector)))
        self._nodes = seen
        try:
            await self._follow()
        except PdserveError as error:
            if str(error) != self._trouble:
                _log.error("the number of Ray nodes does not follow", code=error.code, cause=str(error))
            self._trouble = str(error)
        else:
            self._trouble = ""

    def pools(self) -> Mapping[Role, Replicas]:
        """As the engines are; one that waits for a node that finds no machine counts as nothing."""
        return {role: self._credited(role, replicas) for role, replicas in self._engines.pools().items()}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        await self._engines.scale(role, engines, self._leaving(role, victims))
        await self._follow()

    async def flip(self, engine_id: str, role: Role) -> None:
        await self._engines.flip(engine_id, role)

    def _credited(self, role: Role, replicas: Replicas) -> Replicas:
        pool = self._nodes.get(role)
        lost = sum(node.state is PodState.LOST for node in pool.nodes) if pool else 0
        return replace(replicas, warming=max(0, replicas.warming - lost))

    def _leaving(self, role: Role, victims: tuple[str, ...]) -> tuple[str, ...]:
        """Of a StatefulSet those on its highest numbers, for only those nodes can go."""
        pool, target = self._nodes.get(role), self._targets.get(role)
        if pool is None or target is None or target.kind != "StatefulSet":
            return victims
        numbers = {node.ip: node.number for node in pool.nodes}
        on_nodes = [each for each in self._members().values() if each.role is role and _host(each) in numbers]
        on_nodes.sort(key=lambda each: numbers[_host(each)], reverse=True)
        return tuple(each.id for each in on_nodes)

    async def _follow(self) -> None:
        members = tuple(self._members().values())
        for role, pool in self._nodes.items():
            target = self._targets[role]
            wanted = needed(role, target, self._nodes, members)
            if wanted != pool.held.replicas:
                await scale_to(self._client, target, wanted, self._idle(pool, wanted, members))
                _log.info("Ray nodes follow the engines", target=str(target), before=pool.held.replicas, nodes=wanted)
                self._nodes[role] = replace(pool, held=replace(pool.held, replicas=wanted))

    def _idle(self, pool: Pool, wanted: int, members: Sequence[Member]) -> tuple[str, ...]:
        """Nodes without an engine, as many as are too many; those without a machine first."""
        taken = {_host(each) for each in members if each.phase in _ON_A_NODE}
        idle = [node for node in pool.nodes if not node.ip or node.ip not in taken]
        idle.sort(key=lambda node: node.state is PodState.READY)
        return tuple(node.name for node in idle[: max(0, len(pool.nodes) - wanted)])
