"""What every launcher promises the supervisor about a process with followers."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pdserve.cluster import gang, ray_launcher
from pdserve.cluster.launcher import Launched, Launcher, LaunchSpec, Resources
from pdserve.core.errors import CheckpointError, EngineDied
from tests.contract.launched_program import MISSED
from tests.contract.launching_program import open_launcher
from tests.contract.processes import count_fds, descendants, is_gone, parent_of
from tests.contract.rooms import rooms
from tests.contract.test_launchers import launched, spec

pytestmark = pytest.mark.asyncio(loop_scope="module")
IN_RAY = pytest.param("ray", marks=pytest.mark.slow)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["process", IN_RAY])
async def launcher(request: pytest.FixtureRequest) -> AsyncIterator[Launcher]:
    """Gangs in Ray take half a minute together."""
    async with AsyncExitStack() as held:
        yield await open_launcher(request.param, held)


def gang_of(leader: LaunchSpec, *followers: LaunchSpec) -> LaunchSpec:
    named = [replace(follower, name=f"follower-{number}") for number, follower in enumerate(followers, 1)]
    return replace(leader, name="leader", followers=tuple(named))


def lead(behaviour: str = "lead", **payload: object) -> LaunchSpec:
    return spec(behaviour, **{"awaited": 2, **payload})


def programs() -> list[int]:
    """The members of all gangs that run, wherever they were placed on this machine."""
    return [pid for pid in descendants(os.getpid()) if b"tests.contract.launched_program" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def pids(facts: dict[str, Any]) -> list[int]:
    return [int(follower.partition("@")[0]) for follower in facts["followers"].split()]


async def nothing_is_left() -> bool:
    deadline = time.monotonic() + 10
    while programs() or await rooms():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


async def settled_fds() -> int:
    """Our open descriptors, once half a second has passed without one less: Ray closes its lines late."""
    fewer, now = count_fds() + 1, count_fds()
    while now < fewer:
        await asyncio.sleep(0.5)
        fewer, now = now, count_fds()
    return now


@asynccontextmanager
async def met(launcher: Launcher, what: LaunchSpec) -> AsyncIterator[tuple[Launched, list[int]]]:
    """A gang that is complete, and the process ids of its followers; nothing of it may be left afterwards."""
    async with launched(launcher, what) as whole:
        yield whole, pids(await whole.ready())
    assert await nothing_is_left()


async def test_followers_come_to_the_door_of_their_leader(launcher: Launcher) -> None:
    async with met(launcher, gang_of(lead(), spec("follow"), spec("follow"))) as (whole, followers):
        assert len({whole.pid, *followers}) == 3
        assert sorted(programs()) == sorted([whole.pid, *followers])


async def test_the_door_is_shut_when_its_leader_is_gone(launcher: Launcher) -> None:
    async with met(launcher, gang_of(lead(), spec("follow"), spec("follow"))) as (whole, _):
        host, _, port = (await whole.ready())["door"].rpartition(":")
        socket.create_connection((host, int(port))).close()
        whole.kill()
        await whole.ended()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


async def test_terminate_drains_the_leader_and_its_followers_end_with_it(
    launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    async with met(launcher, gang_of(lead(), spec("follow"), spec("follow"))) as (whole, _):
        whole.terminate()
        assert await whole.ended() == 0
        whole.terminate()
        whole.kill()
    said = capfd.readouterr().err
    assert all(f"[follower-{number}] let go\n" in said for number in (1, 2))


async def test_a_leader_may_take_its_time_after_it_has_let_its_followers_go(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang, "GRACE", 0.2)
    async with met(launcher, gang_of(lead(lingers=1.0), spec("follow"), spec("follow"))) as (whole, followers):
        whole.terminate()
        assert await whole.ended() == 0
        assert all(is_gone(pid, within=0) for pid in followers)


async def test_kill_ends_all_at_once(launcher: Launcher) -> None:
    async with met(launcher, gang_of(lead(), spec("cling"), spec("cling"))) as (whole, followers):
        whole.kill()
        assert await whole.ended() == -signal.SIGKILL
        assert all(is_gone(pid, within=0) for pid in followers)


async def test_a_leader_that_has_lost_a_follower_ends_with_a_reason_of_its_own(
    launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    async with met(launcher, gang_of(lead(), spec("follow"), spec("follow"))) as (whole, followers):
        os.kill(followers[0], signal.SIGKILL)
        assert await whole.ended() == MISSED
        assert all(is_gone(pid, within=0) for pid in followers)
    assert "a follower is lost, its gang ends" in "".join(capfd.readouterr())


async def test_a_leader_that_does_not_notice_the_loss_of_a_follower_is_killed(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang, "GRACE", 0.5)
    async with met(launcher, gang_of(lead("deaf"), spec("follow"), spec("cling"))) as (whole, followers):
        os.kill(followers[0], signal.SIGKILL)
        assert await whole.ended() == -signal.SIGKILL
        assert all(is_gone(pid, within=0) for pid in followers)


async def test_followers_end_with_a_leader_that_was_killed(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gang, "GRACE", 1.0)
    async with met(launcher, gang_of(lead(), spec("follow"), spec("cling"))) as (whole, followers):
        os.kill(whole.pid, signal.SIGKILL)
        assert await whole.ended() == -signal.SIGKILL
        assert all(is_gone(pid, within=0) for pid in followers)
    assert capfd.readouterr().err.count("let go") == 2


async def test_what_a_follower_refuses_is_the_gangs_own_error(launcher: Launcher) -> None:
    async with launched(launcher, gang_of(lead(), spec("follow"), spec("refuse"))) as whole:
        with pytest.raises(CheckpointError, match=r"no config\.json in /nowhere"):
            await whole.ready()
    assert await nothing_is_left()


async def test_what_the_leader_refuses_is_not_blamed_on_its_followers(launcher: Launcher) -> None:
    async with launched(launcher, gang_of(spec("refuse"), spec("follow"), spec("follow"))) as whole:
        with pytest.raises(CheckpointError, match=r"no config\.json in /nowhere"):
            await whole.ready()
        assert await whole.ended() == 78
    assert await nothing_is_left()


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        ("crash", r"follower-2 exited with code 3 before(.|\n)*something is wrong"),
        ("quit", "follower-2 exited with code 4 before leader was ready"),
    ],
)
async def test_a_follower_that_dies_before_the_leader_is_ready_is_named(
    launcher: Launcher, behaviour: str, cause: str
) -> None:
    async with launched(launcher, gang_of(lead(), spec("follow"), spec(behaviour))) as whole:
        with pytest.raises(EngineDied, match=cause):
            await whole.ready()
    assert await nothing_is_left()


async def test_a_follower_that_is_killed_is_named_whatever_its_leader_makes_of_it(
    launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    async with launched(launcher, gang_of(lead(awaited=2), spec("follow"))) as whole:
        said = ""
        while "met " not in said:
            await asyncio.sleep(0.05)
            said += capfd.readouterr().err
        [follower] = set(programs()) - {whole.pid}
        os.kill(follower, signal.SIGKILL)
        with pytest.raises(EngineDied, match="follower-1 was killed by SIGKILL before leader was ready"):
            await whole.ready()
        assert await whole.ended() == MISSED
    assert await nothing_is_left()


async def test_a_follower_that_cannot_be_launched_takes_all_along(launcher: Launcher) -> None:
    unspeakable = spec("follow", what=b"no JSON")
    with pytest.raises((TypeError, EngineDied), match="not JSON serializable"):
        await launcher.launch(gang_of(lead(), spec("follow"), unspeakable))
    assert await nothing_is_left()


@pytest.mark.parametrize("started", [0, 1, 2])
async def test_a_launch_that_is_called_off_leaves_nothing(launcher: Launcher, started: int) -> None:
    whole = gang_of(lead(), spec("follow"), spec("follow"))
    async with met(launcher, whole):
        pass  # whatever the first launch opens for good is open now
    before = await settled_fds()
    launching = asyncio.ensure_future(launcher.launch(whole))
    async with asyncio.timeout(20):
        await asyncio.sleep(0)
        while len(programs()) < started:
            await asyncio.sleep(0.001)
    assert launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert await nothing_is_left()
    async with asyncio.timeout(20):
        while count_fds() > before:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("launcher", [IN_RAY], indirect=True)
async def test_none_is_started_before_there_is_room_for_all(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_launcher, "PATIENCE", 0.2)
    greedy = replace(spec("follow"), resources=Resources(cpus=1000))
    launching = asyncio.ensure_future(launcher.launch(gang_of(lead(), spec("follow"), greedy)))
    await asyncio.wait([launching], timeout=2.0)
    assert not launching.done()
    assert programs() == []
    assert await rooms() == ["leader"]
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    assert "waiting for room in the Ray cluster" in "".join(capfd.readouterr())
    assert await nothing_is_left()


@pytest.mark.parametrize("launcher", [IN_RAY], indirect=True)
async def test_a_gang_with_a_frozen_ray_actor_can_be_killed(launcher: Launcher) -> None:
    async with met(launcher, gang_of(lead(), spec("follow"), spec("follow"))) as (whole, followers):
        os.kill(parent_of(followers[0]), signal.SIGSTOP)
        whole.kill()
        assert await whole.ended() == -signal.SIGKILL
        assert all(is_gone(pid, within=5) for pid in followers)
