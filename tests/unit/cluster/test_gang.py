"""Whose end ends a gang, and what is told of it, as far as real processes cannot be made to do it in that order."""

import asyncio
import signal
from typing import Any

import pytest

from pdserve.cluster import gang
from pdserve.cluster.gang import LaunchedGang
from pdserve.cluster.launcher import LaunchSpec
from pdserve.core.errors import CheckpointError, DeadlineExceeded, EngineDied, LinkLost, PdserveError

KILLED = -signal.SIGKILL


class Played:
    """A launched process that ends when the test says so, or is killed while it can be reached."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.asked = False
        self.reached = True

    async def ready(self) -> dict[str, Any]:
        return await asyncio.shield(self._answer)

    async def ended(self) -> int:
        return await asyncio.shield(self._end)

    def terminate(self) -> None:
        self.asked = True

    def kill(self) -> None:
        if self.reached:
            self.end(KILLED)

    def serve(self) -> None:
        self._answer.set_result({"pid": self.pid})

    def refuse(self, error: PdserveError) -> None:
        self._answer.set_exception(error)

    def end(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)
        if not self._answer.done():
            self._answer.set_exception(EngineDied(f"process {self.pid} said nothing"))


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "GRACE", 0.05)
    monkeypatch.setattr(gang, "_TELLING", 0.2)


def play() -> tuple[LaunchedGang, Played, Played, Played]:
    followers = tuple(LaunchSpec(name=f"follower-{number}", module="") for number in (1, 2))
    members = Played(0), Played(1), Played(2)
    return LaunchedGang(LaunchSpec(name="leader", module="", followers=followers), members), *members


async def heard() -> None:
    """What has happened is known to the gang."""
    await asyncio.sleep(0.01)


async def test_a_follower_that_was_killed_is_the_cause_though_its_leaders_end_is_heard_of_first() -> None:
    whole, leader, follower, _ = play()
    follower.serve()
    leader.refuse(LinkLost("follower-1 hung up"))
    leader.end(78)
    await heard()
    follower.end(KILLED)
    with pytest.raises(EngineDied, match="follower-1 was killed by SIGKILL before leader was ready"):
        await whole.ready()
    assert await whole.ended() == 78


async def test_a_leader_that_refuses_is_the_cause_though_its_followers_end_first() -> None:
    whole, leader, follower, other = play()
    follower.refuse(LinkLost("the leader hung up"))
    follower.end(78)
    await heard()
    other.end(1)
    leader.refuse(CheckpointError("no weights"))
    leader.end(78)
    with pytest.raises(CheckpointError, match="no weights"):
        await whole.ready()


async def test_a_leader_that_only_misses_a_follower_is_not_the_cause() -> None:
    whole, leader, _, other = play()
    other.end(3)
    await heard()
    leader.refuse(DeadlineExceeded("nobody came"))
    leader.end(78)
    with pytest.raises(EngineDied, match="process 2 said nothing"):
        await whole.ready()


async def test_a_leader_that_fails_and_does_not_end_is_told_in_time() -> None:
    whole, leader, _, _ = play()
    leader.refuse(EngineDied("answered nonsense"))
    with pytest.raises(EngineDied, match="answered nonsense"):
        await asyncio.wait_for(whole.ready(), 2)
    whole.kill()
    assert await whole.ended() == KILLED


async def test_a_gang_that_was_killed_blames_no_follower() -> None:
    whole, leader, follower, _ = play()
    follower.serve()
    whole.kill()
    with pytest.raises(EngineDied, match="process 0 said nothing"):
        await whole.ready()
    assert not leader.asked


async def test_a_leader_that_fails_of_the_killing_of_its_followers_was_killed() -> None:
    whole, leader, _, _ = play()
    leader.serve()
    leader.reached = False
    whole.kill()
    leader.end(70)
    assert await whole.ended() == KILLED


@pytest.mark.parametrize("code", [0, 78])
async def test_a_kill_that_comes_too_late_changes_no_exit_code(code: int) -> None:
    whole, leader, _, _ = play()
    leader.end(code)
    await heard()
    whole.kill()
    assert await whole.ended() == code


async def test_followers_that_were_let_go_do_not_end_the_drain_but_one_that_fails_does() -> None:
    whole, leader, follower, other = play()
    leader.serve()
    whole.terminate()
    assert leader.asked
    assert not follower.asked
    follower.end(0)
    ending = asyncio.ensure_future(whole.ended())
    done, _ = await asyncio.wait([ending], timeout=0.3)
    assert not done
    other.end(1)
    assert await asyncio.wait_for(ending, 2) == KILLED


async def test_a_follower_that_ends_well_without_being_let_go_ends_its_gang() -> None:
    whole, leader, follower, other = play()
    leader.serve()
    follower.end(0)
    assert await asyncio.wait_for(whole.ended(), 2) == KILLED
    assert await other.ended() == KILLED
