"""Leadership in virtual time: one acts, and another only when that one cannot any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

import pytest

from pdserve.cluster.k8s.election import Election
from pdserve.core.errors import Conflict, Denied, Unavailable
from pdserve.core.tasks import end
from tests.clocks import ManualClock, settle

SECONDS = 15.0


class Leases:
    """An API server's, which may be out of reach of some or refuse them."""

    def __init__(self) -> None:
        self.body: dict[str, Any] | None = None
        self.version = 0
        self.writes = 0

    def reached_by(self, candidate: "Candidate") -> "Line":
        return Line(self, candidate)

    def keep(self, body: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        self.writes += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.version)}
        self.body = {**deepcopy(body), "metadata": metadata}
        return deepcopy(self.body)

    @property
    def holder(self) -> str:
        assert self.body
        return str(self.body["spec"]["holderIdentity"])


class Line:
    """To the API server, of one candidate."""

    def __init__(self, leases: Leases, candidate: "Candidate") -> None:
        self._leases = leases
        self._candidate = candidate

    async def lease(self, name: str) -> dict[str, Any] | None:
        await self._reach()
        return deepcopy(self._leases.body)

    async def create_lease(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._reach()
        if self._leases.body is not None:
            raise Conflict("exists")
        return self._leases.keep(body)

    async def replace_lease(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._reach()
        if body["metadata"]["resourceVersion"] != str(self._leases.version):
            raise Conflict("changed")
        return self._leases.keep(body)

    async def _reach(self) -> None:
        if self._candidate.frozen:
            await asyncio.Event().wait()
        if self._candidate.fault:
            raise self._candidate.fault


class Candidate:
    def __init__(self, leases: Leases, name: str, clock: ManualClock) -> None:
        self.fault: Exception | None = None
        self.frozen = False
        self.acts = False
        self.terms = 0
        self.stopped_at = 0.0
        self._clock = clock
        self.election = Election(leases.reached_by(self), "leader", name, clock, seconds=SECONDS)

    async def lead(self) -> None:
        self.acts, self.terms = True, self.terms + 1
        try:
            await asyncio.Event().wait()
        finally:
            self.acts = False
            self.stopped_at = self._clock.monotonic()


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.leases = Leases()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def join(self, name: str) -> Candidate:
        candidate = Candidate(self.leases, name, self.clock)
        self.tasks[name] = asyncio.create_task(candidate.election.run(candidate.lead))
        await settle()
        return candidate


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.timeout(20), opened() as bench:
        yield bench


@asynccontextmanager
async def opened() -> AsyncIterator[Bench]:
    bench = Bench()
    try:
        yield bench
    finally:
        await end(bench.tasks.values())


async def test_the_first_leads_and_renews_and_others_wait(bench: Bench) -> None:
    first, second = await bench.join("a"), await bench.join("b")
    await bench.clock.advance(120)
    assert (first.acts, first.terms, second.acts) == (True, 1, False)
    assert (bench.leases.holder, second.election.holder) == ("a", "a")
    assert bench.leases.body is not None
    assert bench.leases.body["spec"]["leaseTransitions"] == 0


async def test_when_it_ends_another_leads_at_once(bench: Bench) -> None:
    first, second = await bench.join("a"), await bench.join("b")
    await bench.clock.advance(30)
    await end([bench.tasks["a"]])
    assert not first.acts
    assert bench.leases.holder == ""
    await bench.clock.advance(2)
    assert second.acts
    assert bench.leases.body is not None
    assert bench.leases.body["spec"]["leaseTransitions"] == 1


async def test_of_one_that_died_the_lease_ends_first(bench: Bench) -> None:
    first, second = await bench.join("a"), await bench.join("b")
    await bench.clock.advance(30)
    first.fault = Unavailable("it is dead")  # so that it neither renews nor gives back
    await end([bench.tasks["a"]])
    await bench.clock.advance(SECONDS - 2)
    assert not second.acts
    await bench.clock.advance(4)
    assert second.acts


async def test_a_leader_that_cannot_renew_stops_before_another_may_begin(bench: Bench) -> None:
    first, second = await bench.join("a"), await bench.join("b")
    await bench.clock.advance(30)
    cut = bench.clock.monotonic()
    first.fault = Unavailable("the API server does not answer")
    await bench.clock.advance(9)
    assert first.acts
    assert first.election.leads()
    for _ in range(60):
        await bench.clock.advance(0.1)
        assert not (first.acts and second.acts)
        if second.acts:
            break
    assert cut + 8 <= first.stopped_at <= cut + SECONDS * 2 / 3
    await bench.clock.advance(SECONDS)
    assert second.acts
    first.fault = None
    await bench.clock.advance(60)
    assert (first.acts, second.acts) == (False, True)


async def test_a_renewal_that_hangs_is_not_waited_for(bench: Bench) -> None:
    first = await bench.join("a")
    first.frozen = True
    await bench.clock.advance(SECONDS * 2 / 3)
    assert not first.acts
    first.frozen = False
    await bench.clock.advance(SECONDS)
    assert (first.acts, first.terms) == (True, 2)


async def test_a_process_that_was_stopped_for_long_may_not_act(bench: Bench) -> None:
    first = await bench.join("a")
    bench.clock.jump(SECONDS)
    assert not first.election.leads()


async def test_without_rights_nobody_leads_and_nobody_ends(bench: Bench) -> None:
    first = await bench.join("a")
    first.fault = Denied("no")
    second = await bench.join("b")
    second.fault = Denied("no")
    await bench.clock.advance(60)
    assert not first.acts
    assert not second.acts
    assert not bench.tasks["a"].done()


async def test_what_the_leader_fails_with_ends_its_candidacy(bench: Bench) -> None:
    async def fail() -> None:
        raise RuntimeError("broken")

    candidate = Candidate(bench.leases, "a", bench.clock)
    with pytest.raises(RuntimeError, match="broken"):
        await candidate.election.run(fail)
    assert bench.leases.holder == "", "the Lease is given back"
