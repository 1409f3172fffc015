"""A queue of requests in which every tenant gets its share: strict priorities, then start-time fair queueing.

Start-time fair queueing (Goyal, Vin, Cheng 1996): a tenant's tag is the virtual time from which its next request may
be served; serving one of a cost moves it on by cost ÷ weight, and virtual time is the tag of what was served last.
Whoever asks after a pause starts at virtual time, so nobody saves up a claim by not asking. What a request turns out to
have cost is charged later, by moving the tag.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[T]):
    """One that waits. cost: in seconds of one engine, as foreseen."""

    item: T
    tenant: str
    priority: int
    cost: float
    number: int


class Ahead(NamedTuple):
    """What would be served before a newcomer: how many requests, of them those of its own tenant, and what all cost."""

    requests: float
    own: int
    cost: float


@dataclass(slots=True)
class _Lane(Generic[T]):
    """What waits of one tenant with one priority, in order of arrival."""

    waiting: "deque[Waiting[T]]" = field(default_factory=deque)
    cost: float = 0.0


class FairQueue(Generic[T]):
    """Work conserving: as long as something waits, first() gives it. Weights are looked up by tenant, 1 if unknown."""

    def __init__(self, weights: dict[str, float] | None = None, credit: float = 0.0) -> None:
        """credit: cost by which a tenant that asked for less than its share may come before its time; others wait for
        that longer at most."""
        self._weights = weights or {}
        self._credit = credit
        self._lanes: dict[int, dict[str, _Lane[T]]] = {}
        self._tags: dict[str, float] = {}
        self._now = 0.0
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiting[T]]:
        """In no particular order."""
        for lanes in self._lanes.values():
            for lane in lanes.values():
                yield from lane.waiting

    def by_tenant(self) -> dict[str, int]:
        """How many wait, of those tenants that have some."""
        counts: dict[str, int] = {}
        for lanes in self._lanes.values():
            for tenant, lane in lanes.items():
                counts[tenant] = counts.get(tenant, 0) + len(lane.waiting)
        return counts

    def push(self, item: T, *, tenant: str, priority: int, cost: float) -> Waiting[T]:
        if not any(tenant in lanes for lanes in self._lanes.values()):
            self._tags[tenant] = self._tag(tenant)
        waiting = Waiting(item, tenant, priority, cost, next(self._numbers))
        lane = self._lanes.setdefault(priority, {}).setdefault(tenant, _Lane())
        lane.waiting.append(waiting)
        lane.cost += cost
        self._length += 1
        return waiting

    def first(self) -> Waiting[T] | None:
        """Who is next; it stays until it is served or leaves."""
        if not self._lanes:
            return None
        lanes = self._lanes[min(self._lanes)]
        tenant = min(lanes, key=lambda name: (self._tags[name], lanes[name].waiting[0].number))
        return lanes[tenant].waiting[0]

    def leave(self, waiting: Waiting[T]) -> None:
        """It waits no longer, served or not."""
        lanes = self._lanes[waiting.priority]
        lane = lanes[waiting.tenant]
        lane.waiting.remove(waiting)
        lane.cost -= waiting.cost
        self._length -= 1
        if not lane.waiting:
            del lanes[waiting.tenant]
            if not lanes:
                del self._lanes[waiting.priority]

    def serve(self, tenant: str, cost: float) -> None:
        """A request of the tenant is served, whether it has waited or not."""
        tag = self._tag(tenant)
        self._now = max(self._now, tag)
        self._tags[tenant] = tag + cost / self._weight(tenant)

    def correct(self, tenant: str, cost: float) -> None:
        """What was served has cost so much more than was foreseen, or less if negative."""
        self._tags[tenant] = self._tag(tenant) + cost / self._weight(tenant)

    def is_owed(self, tenant: str) -> bool:
        """Whether the tenant has had less than its share of late."""
        return self._tag(tenant) < self._now

    def ahead(self, tenant: str, priority: int) -> Ahead:
        """Of a newcomer, if nobody else came."""
        requests = cost = 0.0
        for more_urgent, lanes in self._lanes.items():
            if more_urgent < priority:
                requests += sum(len(lane.waiting) for lane in lanes.values())
                cost += sum(lane.cost for lane in lanes.values())
        lanes = self._lanes.get(priority, {})
        own = lanes.get(tenant) or _Lane[T]()
        tag = self._tag(tenant) + own.cost / self._weight(tenant)
        for name, lane in lanes.items():
            due = lane.cost if name == tenant else max(0.0, tag - self._tags[name]) * self._weight(name)
            share = min(1.0, due / lane.cost) if lane.cost > 0 else 1.0
            requests += share * len(lane.waiting)
            cost += share * lane.cost
        return Ahead(requests, len(own.waiting), cost)

    def _tag(self, tenant: str) -> float:
        """Who is alone with nobody to share with starts at virtual time."""
        if self._tags.keys() <= {tenant}:
            return max(self._now, self._tags.get(tenant, -inf))
        return max(self._now - self._credit / self._weight(tenant), self._tags.get(tenant, -inf))

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
