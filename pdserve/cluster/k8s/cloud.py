"""Pods as the scaler's cloud: each, or each group of a LeaderWorkerSet, is an engine, and what holds those of a pool is
scaled."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from pdserve.cluster.k8s.pods import count
from pdserve.cluster.k8s.target import Held, Target
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Role
from pdserve.core.errors import Conflict, Unavailable, Unsupported
from pdserve.scaler.decision import Replicas
from pdserve.scaler.policy import Policy

if TYPE_CHECKING:
    from pdserve.cluster.k8s.client import KubeClient

_ATTEMPTS = 3
_CREATION = 10.0
"""Seconds in which whoever makes pods has made those that were asked for."""
NO_FLIPS = (
    "flip.enabled: an engine in a pod of its own keeps its pool's role, because the pod returns with it; "
    "set it to false, or run engines on Ray"
)

_log = structlog.get_logger(__name__)


class PodCloud:
    """scaler.runner.Cloud of one namespace."""

    def __init__(
        self, client: "KubeClient", targets: Mapping[Role, Target], clock: Clock, may_act: Callable[[], bool]
    ) -> None:
        """may_act: whether this process is the one that scales; asked before each change."""
        self._client = client
        self._targets = targets
        self._clock = clock
        self._may_act = may_act
        self._asked_at: dict[Role, float] = {}
        self._pools: dict[Role, Replicas] = {}
        self.held: dict[Role, Held] = {}

    async def look(self) -> None:
        """Count anew. Raises Unavailable or Denied, and then the counts before stand."""
        pools = {}
        for role, target in self._targets.items():
            found = await self._client.look(target)
            just_asked = self._clock.monotonic() - self._asked_at.get(role, float("-inf")) < _CREATION
            pools[role] = count(await self._client.pods(found.selector), found.replicas, just_asked=just_asked)
            self.held[role] = found
        self._pools = pools

    def pools(self) -> Mapping[Role, Replicas]:
        return {role: self._pools.get(role, Replicas()) for role in Role}

    async def scale(self, role: Role, engines: int, victims: tuple[str, ...]) -> None:
        """Which pods leave is for their holder to say: the highest numbers of a StatefulSet or a
        LeaderWorkerSet. They drain."""
        target = self._targets.get(role)
        if target is None:
            raise Unsupported(f"nothing is configured to hold {role} engines", "role")
        await scale_to(self._client, target, engines, may_act=self._may_act)
        self._asked_at[role] = self._clock.monotonic()
        known = self.pools()[role]
        ready = min(known.ready, engines)
        self._pools[role] = Replicas(wanted=engines, ready=ready, warming=min(known.warming, engines - ready))

    async def flip(self, engine_id: str, role: Role) -> None:
        raise Unsupported(NO_FLIPS, "flip")


async def scale_to(
    client: "KubeClient",
    target: Target,
    replicas: int,
    leaving: Sequence[str] = (),
    *,
    may_act: Callable[[], bool] = lambda: True,
) -> None:
    """Tried again when somebody else has changed the object meanwhile. Raises as KubeClient does."""
    for attempt in range(1, _ATTEMPTS + 1):
        place = 0 if target.has_scale else (await client.look(target)).place
        if not may_act():
            raise Unavailable("another scaler may lead by now")
        try:
            await client.scale(target, replicas, place=place, leaving=leaving)
            return
        except Conflict as error:
            if attempt == _ATTEMPTS:
                raise
            _log.info("scaling met another change, trying again", target=str(target), cause=str(error))


def refuse_flips(policy: Policy) -> str:
    """Why a policy cannot be had with pods; empty when it can."""
    if policy.flip.enabled:
        return NO_FLIPS
    return "pools.unified: pods are of prefill or decode" if policy.pools.unified else ""
