"""The supervisor with real child processes and, for engines, a real session."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from pdserve.cluster.launcher import Launched, LaunchSpec
from pdserve.cluster.member import Phase
from pdserve.cluster.plan import Members
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.supervisor import Desired, Supervisor
from pdserve.config.times import Times
from pdserve.core.clock import SystemClock
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import ConfigError
from tests.contract.processes import is_gone

TIMES = Times(
    heartbeat=0.2,
    suspect=1.5,
    fence=2.5,
    gateway_fence=2.5,
    restart_backoff=0.05,
    start_timeout=30.0,
    drain_timeout=10.0,
    lease_guard=0.1,
)
"""Short, but long enough for a process that shares its core with others."""


@dataclass
class Running:
    supervisor: Supervisor
    history: list[tuple[Endpoint, ...]] = field(default_factory=list)

    async def reaches(self, holds: Callable[[Members], bool]) -> None:
        async with asyncio.timeout(20):
            await self.supervisor.until(holds)

    async def is_ready(self, *ids: str) -> None:
        await self.reaches(lambda members: all(members[id].phase is Phase.READY for id in ids))

    def pid(self, id: str) -> int:
        return self.supervisor.members[id].pid


def process(id: str, role: Role | None = None, **payload: Any) -> Desired:
    if role is None:
        payload = {"behaviour": "gateway", **payload}

    def launch(epoch: int) -> LaunchSpec:
        return LaunchSpec(name=id, module="tests.unit.cluster.supervised_program", payload={"epoch": epoch, **payload})

    return Desired(id=id, role=role, launch=launch)


@asynccontextmanager
async def supervised(*desired: Desired, times: Times = TIMES) -> AsyncIterator[Running]:
    """A running supervisor; when the block is left, it is cancelled and must leave no process."""
    history: list[tuple[Endpoint, ...]] = []
    supervisor = Supervisor(desired, ProcessLauncher(), times=times, clock=SystemClock(), on_change=history.append)
    run = asyncio.create_task(supervisor.run())
    try:
        yield Running(supervisor, history)
    finally:
        pids = [member.pid for member in supervisor.members.values() if member.pid]
        run.cancel()
        await asyncio.wait([run], timeout=15)
        assert run.done()
        assert all(is_gone(pid, within=2) for pid in pids)


async def test_engines_and_gateway_come_up_and_engines_are_published() -> None:
    async with supervised(process("p", Role.PREFILL), process("gateway")) as running:
        await running.is_ready("p", "gateway")
        [ready] = running.history[-1]
        assert (ready.engine_id, ready.role, ready.state) == ("p", Role.PREFILL, EngineState.READY)
        assert ready.address.startswith("127.0.0.1:")
        assert ready.pid == running.pid("p")


async def test_an_engine_killed_from_outside_comes_back_under_a_new_epoch() -> None:
    async with supervised(process("p", Role.PREFILL)) as running:
        await running.is_ready("p")
        [before] = running.history[-1]
        os.kill(before.pid, signal.SIGKILL)
        await running.reaches(lambda members: members["p"].phase is Phase.DOWN)
        await running.is_ready("p")
        [after] = running.history[-1]
        assert after.epoch != before.epoch
        assert after.pid != before.pid
        states = [published[0].state for published in running.history]
        assert EngineState.DEAD in states


async def test_heartbeats_keep_an_engine_ready_for_longer_than_the_fence() -> None:
    async with supervised(process("p", Role.PREFILL)) as running:
        await running.is_ready("p")
        pid = running.pid("p")
        await asyncio.sleep(TIMES.fence + 0.5)
        assert running.supervisor.members["p"].phase is Phase.READY
        assert running.pid("p") == pid


@pytest.mark.parametrize("role", [Role.PREFILL, None], ids=["engine", "gateway"])
async def test_a_frozen_member_is_suspected_then_fenced_then_replaced(role: Role | None) -> None:
    async with supervised(process("p", role)) as running:
        await running.is_ready("p")
        frozen = running.pid("p")
        os.kill(frozen, signal.SIGSTOP)
        await running.reaches(lambda members: members["p"].phase is Phase.SUSPECT)
        await running.reaches(lambda members: members["p"].phase is Phase.DOWN)
        assert is_gone(frozen, within=0)
        await running.is_ready("p")
        assert running.pid("p") != frozen


async def test_an_engine_that_is_heard_again_stays_and_the_log_tells_both() -> None:
    times = replace(TIMES, suspect=0.8, fence=20.0, lease=30.0)
    with capture_logs() as logs:
        async with supervised(process("p", Role.PREFILL), times=times) as running:
            await running.is_ready("p")
            pid = running.pid("p")
            os.kill(pid, signal.SIGSTOP)
            await running.reaches(lambda members: members["p"].phase is Phase.SUSPECT)
            os.kill(pid, signal.SIGCONT)
            await running.is_ready("p")
            assert running.pid("p") == pid
    assert [entry["event"] for entry in logs if entry.get("process") == "p"][:3] == ["ready", "silent", "heard again"]


async def test_an_engine_whose_session_belongs_to_another_epoch_is_not_taken_for_alive() -> None:
    async with supervised(process("p", Role.PREFILL, behaviour="impostor")) as running:
        await running.is_ready("p")
        await running.reaches(lambda members: members["p"].phase is Phase.KILLED)


async def test_a_gateways_answers_are_signs_of_life() -> None:
    async with supervised(process("gateway")) as running:
        await running.is_ready("gateway")
        ready = running.supervisor.members["gateway"].last_heard
        await running.reaches(lambda members: members["gateway"].last_heard > ready + 2 * TIMES.heartbeat)


async def test_a_gateway_says_where_it_is_to_be_asked_for_a_sign_of_life() -> None:
    async with supervised(process("gateway", address="127.0.0.1:1")) as running:
        await running.is_ready("gateway")
        ready = running.supervisor.members["gateway"]
        assert ready.address == "127.0.0.1:1"
        await running.reaches(lambda members: members["gateway"].last_heard > ready.last_heard + 2 * TIMES.heartbeat)


async def test_engines_survive_the_death_of_the_gateway() -> None:
    async with supervised(process("p", Role.PREFILL), process("gateway")) as running:
        await running.is_ready("p", "gateway")
        engine, gateway = running.pid("p"), running.pid("gateway")
        os.kill(gateway, signal.SIGKILL)
        await running.reaches(lambda members: members["gateway"].phase is Phase.DOWN)
        await running.is_ready("p", "gateway")
        assert running.pid("p") == engine
        assert running.pid("gateway") != gateway


async def test_an_engine_that_never_becomes_ready_is_replaced() -> None:
    times = replace(TIMES, start_timeout=1.0)
    async with supervised(process("p", Role.PREFILL, behaviour="silent"), times=times) as running:
        await running.reaches(lambda members: members["p"].pid > 0)
        first = running.pid("p")
        await running.reaches(lambda members: members["p"].deaths == 2)
        assert is_gone(first, within=0)


async def test_a_refused_configuration_ends_everything_with_the_childs_words() -> None:
    supervisor = Supervisor(
        [process("p", Role.PREFILL), process("d", Role.DECODE, behaviour="refuse")],
        ProcessLauncher(),
        times=TIMES,
        clock=SystemClock(),
        on_change=lambda _: None,
    )
    async with asyncio.timeout(20):
        with pytest.raises(ConfigError, match=r"d: no config\.json"):
            await supervisor.run()
    assert is_gone(supervisor.members["p"].pid, within=0)


async def test_drain_ends_fronts_before_the_gateway_before_the_engines_and_then_the_supervisor() -> None:
    history: list[tuple[Endpoint, ...]] = []
    front = replace(process("front"), ends_first=True)
    supervisor = Supervisor(
        [process("p", Role.PREFILL), process("gateway"), front],
        ProcessLauncher(),
        times=TIMES,
        clock=SystemClock(),
        on_change=history.append,
    )
    order: list[str] = []

    async def note(id: str) -> None:
        await supervisor.until(lambda members: members[id].phase is Phase.STOPPED)
        order.append(id)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        await supervisor.until(lambda members: all(member.phase is Phase.READY for member in members.values()))
        group.create_task(note("p"))
        group.create_task(note("gateway"))
        group.create_task(note("front"))
        await supervisor.drain()
    assert order == ["front", "gateway", "p"]
    assert [published[0].state for published in history][-2:] == [EngineState.DRAINING, EngineState.DEAD]


async def test_an_engine_that_refuses_while_others_drain_ends_none_of_them(tmp_path: Path) -> None:
    refuses, ends = tmp_path / "refuses", tmp_path / "ends"
    engine = process("d", Role.DECODE, behaviour="refuse", when=str(refuses))
    async with supervised(process("gateway", lasts_until=str(ends)), engine) as running:
        await running.is_ready("gateway")
        await running.reaches(lambda members: members["d"].pid > 0)
        draining = asyncio.create_task(running.supervisor.drain())
        await running.reaches(lambda members: members["gateway"].phase is Phase.DRAINING)
        refuses.touch()
        await running.reaches(lambda members: members["d"].phase is Phase.STOPPED)
        assert running.supervisor.members["gateway"].phase is Phase.DRAINING
        assert not is_gone(running.pid("gateway"), within=0)
        ends.touch()
        async with asyncio.timeout(20):
            await draining


async def test_drain_kills_what_does_not_end_in_time() -> None:
    times = replace(TIMES, drain_timeout=0.5)
    supervisor = Supervisor(
        [process("p", Role.PREFILL, behaviour="stubborn"), process("gateway")],
        ProcessLauncher(),
        times=times,
        clock=SystemClock(),
        on_change=lambda _: None,
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        run = group.create_task(supervisor.run())
        await supervisor.until(lambda members: members["p"].phase is Phase.READY)
        pid = supervisor.members["p"].pid
        await supervisor.drain()
        await run
    assert is_gone(pid, within=0)


class FullCluster:
    """A launcher that never has room."""

    def __init__(self) -> None:
        self.called_off = 0

    async def launch(self, spec: LaunchSpec) -> Launched:
        try:
            never: asyncio.Future[Launched] = asyncio.get_running_loop().create_future()
            return await never
        finally:
            self.called_off += 1


async def test_drain_calls_off_a_launch_that_waits_for_room() -> None:
    launcher = FullCluster()
    desired = [process("p", Role.PREFILL)]
    supervisor = Supervisor(desired, launcher, times=TIMES, clock=SystemClock(), on_change=lambda _: None)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(supervisor.run())
        await supervisor.until(lambda members: members["p"].phase is Phase.STARTING)
        await supervisor.drain()
    assert launcher.called_off == 1


async def test_a_launch_without_room_for_too_long_is_tried_again() -> None:
    launcher = FullCluster()
    times = replace(TIMES, start_timeout=0.3)
    desired = [process("p", Role.PREFILL)]
    supervisor = Supervisor(desired, launcher, times=times, clock=SystemClock(), on_change=lambda _: None)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        run = group.create_task(supervisor.run())
        await supervisor.until(lambda members: members["p"].deaths == 2)
        run.cancel()
    assert launcher.called_off >= 2
